"""coremltools' own tests of its operations, with our evaluator in the place of Core ML's `predict`.

The tests lie in the installed coremltools: what its converter makes of PyTorch's operations, and its own operations.
Each builds or converts a small program, calls `MLModel.predict` and compares what comes out with PyTorch or with
numbers written down. Here `predict` is the evaluator, so on a machine that is no Mac they judge it. Programs and data
are in float32, where coremltools holds them to 1e-4; with `--precision fp16` in float16, where it allows 0.5.

    python benchmarks/coreml_ops.py [torch] [mil] [--cases 3] [--seed 0] [-k EXPRESSION] [--json FILE] [--verbose]

Some of the tests import scipy or torchvision; files of which this machine lacks one are named at the end.
A test has many parameters; `--cases` of them run, drawn by the seed (0: all). Exit status 1 when one is wrong or
crashed.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before coremltools' tests are imported: which backends and precisions they run in.
os.environ |= {"PYMIL_TEST_TARGETS": "mlprogram", "INCLUDE_MIL_FP32_UNIT_TESTS": "1"}

import coremltools
import coremltools._deps
import coremltools.converters.mil.testing_utils
import coremltools.models.utils
import numpy as np
import pytest
from coremltools.converters.mil.frontend.torch.test import testing_utils as torch_tests
from coremltools.converters.mil.mil.ops.tests import testing_utils as mil_tests
from coremltools.models import MLModel
from rich.console import Console
from rich.table import Table

from gemexport.formats.storage.errors import InputError
from gemexport.validators.runtimes.coreml import Program

CONVERTERS = Path(coremltools.__file__).parent / "converters" / "mil"
SUITES = {
    "torch": [
        "frontend/torch/test/test_torch_ops.py",
        "frontend/torch/test/test_torch_quantization_ops.py",
        "frontend/torch/test/test_torch_stateful_model.py",
    ],
    "mil": ["mil/ops/tests"],
}
OUTCOMES = ("agrees", "refused", "wrong", "crashed")
HALF = ("float16", "fp16")  # in what a case says of its data, or a test of its own
# A test whose numbers are right in float16 only: it has 7.899 where 7.9 is meant.
MISPRINTS = ("TestCropResize::test_builder_to_backend_ios16", "TestCropResize::test_builder_to_backend_ios17[")
NOT_JUDGED = "not converted"  # skipped, stopped in the converter, or without a comparison


class Judge:
    """A pytest plugin: picks cases, puts the evaluator in the place of Core ML, and keeps what became of each case."""

    def __init__(self, cases: int, seed: int, precision: str) -> None:
        self.cases, self.choose, self.precision = cases, random.Random(seed), precision
        self.outcomes: dict[str, tuple[str, str]] = {}  # case -> outcome, and why
        self.unread: dict[str, str] = {}  # file of tests that cannot be imported here -> why
        self._predicted = False  # whether the case at hand got numbers from the evaluator
        self._compared = False  # whether coremltools has found the last of them right
        self._stopped: BaseException | None = None  # what the evaluator raised instead

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.unread[report.nodeid.split("/")[-1]] = report.longreprtext.splitlines()[-1].removeprefix("E").strip()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Some cases of each test, of those in the precision asked for."""
        tests: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            if precision(item) == self.precision:
                tests[test_name(item.nodeid)].append(item)
        few = [self.choose.sample(each, min(self.cases or len(each), len(each))) for each in tests.values()]
        items[:] = [item for each in few for item in each]

    def pytest_runtest_setup(self) -> None:
        self._predicted, self._compared, self._stopped = False, False, None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if call.when == "call":
            misprint = self.precision == "fp32" and any(name in item.nodeid for name in MISPRINTS)
            self.outcomes[item.nodeid] = (NOT_JUDGED, "a misprint") if misprint else self._outcome(call.excinfo)
        return report

    def _outcome(self, raised: pytest.ExceptionInfo[BaseException] | None) -> tuple[str, str]:
        why = "" if raised is None else words(raised.value)
        if isinstance(self._stopped, InputError):
            # Where Core ML's own refusal is what the test wants, both refuse.
            return ("refused" if raised else "agrees"), words(self._stopped)
        if self._stopped is not None:
            return "crashed", words(self._stopped)
        if not self._predicted:
            return NOT_JUDGED, why
        # What a test asserts of the program itself, after its numbers were found right, is not the evaluator's.
        return ("agrees", why) if raised is None or self._compared else ("wrong", why)

    def comparing(self, compare: Callable[..., Any]) -> Callable[..., Any]:
        """One of coremltools' functions that compare numbers, noting when it has found them right."""

        @functools.wraps(compare)
        def compared(*arguments: Any, **options: Any) -> Any:
            result = compare(*arguments, **options)
            self._compared = self._predicted
            return result

        return compared

    def predict(self, model: MLModel, data: dict[str, Any], state: Any = None) -> dict[str, np.ndarray]:
        """What MLModel.predict gives on a Mac: the outputs by name."""
        if not model.is_package:
            pytest.skip("a neural network, not an ML program")
        model._verify_input_dict(data)
        model._convert_tensor_to_numpy(data)
        try:
            outputs = self._program(model).predict({name: np.asarray(value) for name, value in data.items()}, state)
        except InputError as error:
            self._stopped = error
            raise RuntimeError("Unable to compute the prediction using ML Program") from error
        except BaseException as error:
            self._stopped = error
            raise
        self._predicted, self._compared = True, False
        return outputs

    def make_state(self, model: MLModel) -> Any:
        """What MLModel.make_state gives on a Mac, as the evaluator keeps it."""
        return State(self._program(model).make_state())

    def _program(self, model: MLModel) -> Program:
        if "program" not in vars(model):
            try:
                model.program = Program(model.package_path, "f16" if self.precision == "fp16" else "f32")
            except BaseException as error:
                self._stopped = error
                raise
        program: Program = model.program
        return program


class State(dict):
    """The evaluator's states with the two methods of coremltools' MLState."""

    def read_state(self, name: str) -> np.ndarray:
        return self[name].numpy().copy()

    def write_state(self, name: str, value: np.ndarray) -> None:
        self[name].copy_(self[name].new_tensor(value))


def precision(item: pytest.Item) -> str:
    """The floats of a case's program and data; tests without such a parameter choose themselves, and count as float32.

    Float16 data in a program of float32 are neither: coremltools holds them to float32's bound, rounded or not.
    """
    specification = getattr(item, "callspec", None)
    parameters = specification.params if specification else {}
    backend = parameters.get("backend")
    found = str(backend[1] if isinstance(backend, tuple) else getattr(backend, "precision", "fp32"))
    said = [item.name.split("[")[0], *(str(value) for name, value in parameters.items() if name != "backend")]
    half = any(word in part for part in said for word in HALF)
    return "mixed" if half and found == "fp32" else found


def test_name(case: str) -> str:
    """A test without its parameters: file, class and function."""
    return case.split("[")[0]


def words(error: BaseException) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def pretend_to_be_a_mac(judge: Judge) -> None:
    """coremltools' tests compare numbers on macOS only; for them this is one, whose Core ML is the evaluator."""
    for module in (coremltools._deps, coremltools.converters.mil.testing_utils, torch_tests):
        module._IS_MACOS = True
    coremltools.models.utils._is_macos = lambda: True
    coremltools.models.utils._macos_version = lambda: (15, 0)

    def predict(model: MLModel, data: dict[str, Any], state: Any = None) -> dict[str, np.ndarray]:
        return judge.predict(model, data, state)

    def make_state(model: MLModel) -> Any:
        return judge.make_state(model)

    MLModel.predict, MLModel.make_state = predict, make_state
    mil_tests.compare_backend = judge.comparing(mil_tests.compare_backend)
    torch_tests.convert_and_compare = judge.comparing(torch_tests.convert_and_compare)


def operation(case: str) -> str:
    """What a case is about: its class, or file, and for MIL the version of the system that the operation came with."""
    file, name = test_name(case).split("::")[:2]
    folder = Path(file).parent.name
    return f"{name.removeprefix('Test')} ({folder})" if folder.startswith("iOS") else name.removeprefix("Test")


def table(outcomes: dict[str, tuple[str, str]]) -> Table:
    """One line an operation: coremltools has a class of tests for each."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case, (outcome, _) in outcomes.items():
        counts[operation(case)][outcome] += 1
    result = Table("operation", *OUTCOMES, NOT_JUDGED)
    for name, count in counts.items():
        result.add_row(name, *[str(count[outcome] or "") for outcome in (*OUTCOMES, NOT_JUDGED)])
    return result


def summary(outcomes: dict[str, tuple[str, str]]) -> str:
    """How many of the cases that convert, and of the tests that they belong to, agree."""
    counts = Counter(outcome for outcome, _ in outcomes.values())
    tests: dict[str, set[str]] = defaultdict(set)
    for case, (outcome, _) in outcomes.items():
        if outcome in OUTCOMES:
            tests[test_name(case)].add(outcome)
    converted = sum(counts[outcome] for outcome in OUTCOMES)
    whole = sum(found == {"agrees"} for found in tests.values())
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (*OUTCOMES, NOT_JUDGED))
    share = counts["agrees"] / max(converted, 1)
    return f"{converted} cases: {told}: {share:.1%} agree; {whole} of {len(tests)} tests in all their cases"


def main() -> int:
    """Parse the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run coremltools' operation tests on the evaluator.")
    parser.add_argument("suites", nargs="*", help="torch, mil, or a path below coremltools/converters/mil")
    parser.add_argument("--cases", type=int, default=3, help="cases of each test; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "fp16"), default="fp32")
    parser.add_argument("-k", default="", help="pytest's expression, to run some tests only")
    parser.add_argument("--json", type=Path, help="write the outcome of every case here")
    parser.add_argument("--verbose", action="store_true", help="list the cases that do not agree, with reasons")
    arguments = parser.parse_args()
    files = [CONVERTERS / file for suite in arguments.suites or SUITES for file in SUITES.get(suite, [suite])]
    judge = Judge(arguments.cases, arguments.seed, arguments.precision)
    pretend_to_be_a_mac(judge)
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "--no-header", "--import-mode=importlib"]
    options += ["--continue-on-collection-errors", "-rN", "-k", arguments.k, *map(str, files)]
    pytest.main(options, plugins=[judge])
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(judge.outcomes))
    if arguments.verbose:
        for case, (outcome, why) in judge.outcomes.items():
            if outcome != "agrees":
                console.print(f"{outcome}: {case.split('/')[-1]}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(summary(judge.outcomes))
    for file, why in judge.unread.items():
        console.print(f"not run, {file}: {why}", markup=False, highlight=False, soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(judge.outcomes, indent=2) + "\n")
    found = Counter(outcome for outcome, _ in judge.outcomes.values())
    return 1 if found["wrong"] or found["crashed"] or not found["agrees"] else 0


if __name__ == "__main__":
    sys.exit(main())
