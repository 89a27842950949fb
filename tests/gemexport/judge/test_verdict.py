"""The verdict: which bounds an artefact is held to, and that each can break."""

from __future__ import annotations

from typing import Any

import pytest

from gemexport.formats.grids.recipe import RECIPES, Recipe
from gemexport.judge.bounds import tie
from gemexport.judge.verdict import bounds
from gemexport.registry import TARGETS
from gemexport.report.schema import verdict
from gemexport.shared.bound import Bound
from gemexport.shared.measured import (
    Divergence,
    GreedyReport,
    GridReport,
    LogitsReport,
    TensorReport,
    TokenizerReport,
    Validation,
    WeightsReport,
)

LATTICE = GridReport(bits=4, block=32, scale_dtype="bf16", lossless=True)
ROUNDED = GridReport(bits=4, block=32, scale_dtype="f16", lossless=False)


def figures(kld: float = 1e-9, top1: float = 1.0, but_ties: float | None = None) -> Divergence:
    return Divergence(kld_mean=kld, kld_max=kld * 10, top1_agreement=top1, top1_but_ties=but_ties, perplexity_ratio=1.0)


def tensor(exact: int = 64, **changes: Any) -> TensorReport:
    base = {
        "name": "w", "shape": (2, 32), "dtype": "bf16", "grid": LATTICE, "source_grid": LATTICE, "compared": 64,
        "exact": exact, "exact_fraction": exact / 64, "max_relative_error": 0.0,
    }  # fmt: skip
    return TensorReport(**{**base, **changes})


def found(*tensors: TensorReport, missing: tuple[str, ...] = (), **parts: Any) -> Validation:
    exact, compared = sum(item.exact for item in tensors), sum(item.compared for item in tensors)
    weights = WeightsReport(
        compared=compared, exact=exact, exact_fraction=exact / max(compared, 1), max_relative_error=0.0,
        missing=missing, tensors=tensors,
    )  # fmt: skip
    return Validation(weights, **parts)


def logits(arithmetic: Any = "f32", equal: int = 32, tokens: int = 2000, **changes: Any) -> LogitsReport:
    return LogitsReport(
        runtime="r", arithmetic=arithmetic, tokens=tokens, conversion=figures(**changes), loss=figures(),
        greedy=GreedyReport(tokens=32, equal=equal),
    )  # fmt: skip


def broken(validation: Validation, recipe: Recipe = RECIPES["default"], **floors: Divergence) -> list[str]:
    held = bounds(validation, {"f32-reordered": figures(1e-9), **floors}, recipe)
    assert (verdict(held)[0] == "pass") == all(bound.held for bound in held)
    return [bound.metric for bound in held if not bound.held]


def test_an_exact_artefact_passes() -> None:
    tokenizer = TokenizerReport(texts=5, equal=5)
    assert broken(found(tensor(), tokenizer=tokenizer, logits=logits())) == []


@pytest.mark.parametrize(
    ("validation", "metric"),
    [
        (found(tensor(exact=63)), "weights.exact_fraction"),
        (found(tensor(), missing=("x",)), "weights.missing"),
        (found(tensor(grid=None, source_grid=None, exact=1)), "weights.exact_fraction"),
        (found(tensor(), tokenizer=TokenizerReport(texts=5, equal=4)), "tokenizer.equal"),
        (found(tensor(), logits=logits(kld=1e-4)), "conversion.kld_mean in f32"),
        (found(tensor(), logits=logits(kld=float("nan"))), "conversion.kld_mean in f32"),
        (found(tensor(), logits=logits(top1=0.99)), "conversion.top1_agreement but for ties in f32"),
        (found(tensor(), logits=logits(top1=0.99, but_ties=0.998)), "conversion.top1_agreement but for ties in f32"),
        (found(tensor(), logits=logits(equal=31)), "greedy.equal in f32"),
    ],
)
def test_each_fault_breaks_its_bound(validation: Validation, metric: str) -> None:
    assert broken(validation) == [metric]


def test_ties_that_rounding_decides_are_no_disagreement() -> None:
    assert broken(found(tensor(), logits=logits(top1=0.9985, but_ties=0.9995))) == []


def test_what_the_format_cannot_hold_is_no_fault() -> None:
    rounded = tensor(exact=10, scale_rounded=True)
    compressed = tensor(exact=3, grid=ROUNDED, source_grid=ROUNDED)
    norm = tensor(exact=60, shape=(64,), grid=None, source_grid=None)
    assert broken(found(tensor(), rounded, compressed, norm)) == []


def test_a_stack_of_matrices_is_judged_as_matrices_are() -> None:
    stack: dict[str, Any] = {"shape": (2, 1, 32)}
    fitted = {"grid": ROUNDED, "source_grid": None, "max_relative_error": 0.1, "rms_relative_error": 0.1}
    assert broken(found(tensor(exact=3, **stack, **fitted))) == []
    assert broken(found(tensor(exact=63, **stack, grid=None, source_grid=None))) == ["weights.exact_fraction"]
    assert broken(found(tensor(exact=63, **stack, max_relative_error=1e-9))) == ["weights.exact_fraction"]


def test_what_was_quantized_anew_need_not_be_exact_but_must_be_near() -> None:
    """A swapped matrix is 1.4 times its size away."""
    near, far, lost = (
        tensor(exact=3, requantized=True, rms_relative_error=error) for error in (0.1, 1.41, float("nan"))
    )
    assert broken(found(tensor(), near)) == []
    assert broken(found(tensor(), near, far)) == ["weights.rms_relative_error"]
    assert broken(found(lost, near)) == ["weights.rms_relative_error"]
    assert broken(found(tensor(exact=3), near)) == ["weights.exact_fraction"]


@pytest.mark.parametrize("source", [None, ROUNDED])
def test_codes_of_a_plain_matrix_are_near_its_values(source: GridReport | None) -> None:
    """No code of its own says what they should be, but another matrix is 1.4 times its size away."""
    near, far, lost = (
        tensor(exact=3, grid=ROUNDED, source_grid=source, rms_relative_error=error)
        for error in (0.1, 1.41, float("nan"))
    )
    assert broken(found(near)) == []
    assert broken(found(near, far)) == ["weights.rms_relative_error"]
    assert broken(found(lost, near)) == ["weights.rms_relative_error"]


def test_what_was_promised_is_there_to_the_bit_whatever_the_file_says_of_itself() -> None:
    """Neither codes that were fitted anew nor an error that a fit is said to have measured excuse anything."""
    for excuse in ({}, {"requantized": True}, {"fitted_rms": 1.0, "codec": "aqlm:2x8:8"}, {"scale_rounded": True}):
        fitted: dict[str, Any] = {
            "source_grid": ROUNDED,
            "grid": ROUNDED,
            "exact": 3,
            "rms_relative_error": 0.1,
            **excuse,
        }
        assert broken(found(tensor(), tensor(**fitted, kept=64))) == []
        assert broken(found(tensor(), tensor(**fitted, kept=63, broken_at=(1, 3)))) == ["weights.kept"]
    (bound,) = [
        bound
        for bound in bounds(found(tensor(kept=63, exact=63, broken_at=(1, 3))), {}, RECIPES["default"])
        if not bound.held
    ]
    assert bound.where is not None
    assert bound.where.endswith("w (from row 1, column 3)")


def test_what_a_tensor_is_for_decides_how_it_is_judged() -> None:
    """A norm of two axes is a norm, and a matrix of one row no vector."""
    norm = {"name": "model.norm.weight", "grid": None, "source_grid": None}
    assert broken(found(tensor(exact=3, max_relative_error=2.0**-20, **norm))) == []
    matrix = {**norm, "name": "model.layers.0.mlp.up_proj.weight", "shape": (64,)}
    assert broken(found(tensor(exact=3, max_relative_error=2.0**-20, **matrix))) == ["weights.exact_fraction"]


def test_of_fewer_than_a_thousand_positions_all_but_one_agree() -> None:
    for tokens in range(2, 1000):
        one, two = ((tokens - missed) / tokens for missed in (1, 2))
        assert broken(found(tensor(), logits=logits(tokens=tokens, top1=one))) == [], tokens
        assert broken(found(tensor(), logits=logits(tokens=tokens, top1=two))) != [], tokens


def test_integers_are_held_to_what_the_programs_own_f32_makes_of_them() -> None:
    validation = found(tensor(), logits=logits("static-activations", kld=3.8e-4), played="f32-f16-constants")
    assert broken(validation, **{"f32-reordered": figures(5.7e-5)}) == ["conversion.kld_mean in static-activations"]
    assert broken(validation, **{"f32-f16-constants": figures(3e-4)}) == []
    assert broken(validation, **{"f32-f16-constants": figures(1e-4)}) == ["conversion.kld_mean in static-activations"]
    # Integers that PyTorch's f32 itself takes otherwise.
    assert broken(validation, **{"f32-reordered": figures(5.7e-5), "f64": figures(2e-4)}) == []


def test_rounding_runtimes_are_held_to_the_noise_of_the_run() -> None:
    validation = found(tensor(), logits=logits("int8-activations", kld=0.005, top1=0.9))
    assert broken(validation, bf16=figures(0.001), **{"int8-activations": figures(0.003)}) == []
    assert broken(validation, bf16=figures(0.001)) == ["conversion.kld_mean in int8-activations"]


def test_f32_is_held_to_what_pytorch_shows_when_it_plays_it() -> None:
    metric = "conversion.kld_mean in f32"
    for played, kld, status in (
        (1e-9, 4.9e-9, []),
        (1e-9, 5.1e-9, [metric]),
        (1e-13, 0.9e-10, []),  # the least limit
        (1e-13, 1.1e-10, [metric]),
        (1.0, 0.9e-3, []),  # the most
        (1.0, 1.1e-3, [metric]),
    ):
        assert broken(found(tensor(), logits=logits(kld=kld)), **{"f32-reordered": figures(played)}) == status
    llama = found(tensor(), logits=logits(kld=3e-5), played="f32-f16-gelu")
    assert broken(llama, **{"f32-f16-gelu": figures(1e-5)}) == []
    assert broken(llama) == [metric], "what another arithmetic is off by says nothing"


def test_ties_are_as_wide_as_the_bound() -> None:
    assert tie(figures(1e-11)) == tie(None) == 1e-3
    even = figures(1e-5).model_copy(update={"kld_max": 1e-5})
    assert tie(even) == pytest.approx(2 * (2 * 5e-5) ** 0.5)


def test_a_tie_is_as_wide_as_the_farthest_position_was() -> None:
    far = figures(4.7e-6).model_copy(update={"kld_max": 5.4e-5})
    assert tie(far) == pytest.approx(2 * (2 * 5.4e-5) ** 0.5)
    assert tie(far.model_copy(update={"kld_max": 9.0})) == pytest.approx(2 * (2 * 1e-3) ** 0.5)


def test_k_quants_are_held_to_the_noise_of_wider_blocks() -> None:
    validation = found(tensor(), logits=logits("int8-activations-256", kld=0.013, top1=0.9))
    noises = {"bf16": figures(0.001), "int8-activations": figures(0.005)}
    assert broken(validation, **noises, **{"int8-activations-256": figures(0.01)}) == []
    assert broken(validation, **noises) == ["conversion.kld_mean in int8-activations-256"]


def test_a_mean_that_few_positions_make_is_held_to_what_it_is_known_to() -> None:
    """Where routers choose other experts, a few positions are off by a nat, and two means by their standard errors."""
    validation = found(tensor(), logits=logits("int8-activations", kld=0.056, top1=0.9))
    uncertain = figures(0.021).model_copy(update={"kld_error": 0.012})
    assert broken(validation, **{"int8-activations": uncertain}) == []
    certain = figures(0.021).model_copy(update={"kld_error": 0.002})
    assert broken(validation, **{"int8-activations": certain}) == ["conversion.kld_mean in int8-activations"]
    further = found(tensor(), logits=logits("int8-activations", kld=0.09, top1=0.9))
    assert broken(further, **{"int8-activations": uncertain}) == ["conversion.kld_mean in int8-activations"]


def test_noises_are_measured_for_who_needs_them() -> None:
    target = TARGETS["gguf"]
    assert "int8-activations-256" not in target.noises_of("Q4_0")
    assert "int8-activations-256" in target.noises_of("Q6_K")
    assert "int8-activations-256" in target.noises_of("somebody-elses"), "its types are not known yet"
    assert TARGETS["mlx"].noises_of("4bit") == TARGETS["onnx"].noises_of("int4") == ("f32-reordered",)
    foreign = TARGETS["onnx"].noises_of("somebody-elses")
    assert {"bf16", "int8-activations"} <= set(foreign), "its activations may be f16, or rounded by accuracy_level 4"


@pytest.mark.parametrize("arithmetic", ["static-int8", "static-int16"])
def test_what_has_no_yardstick_is_at_least_a_number(arithmetic: str) -> None:
    assert broken(found(tensor(), logits=logits(arithmetic, kld=1.4))) == []
    metric = f"conversion.kld_mean in {arithmetic}"
    assert broken(found(tensor(), logits=logits(arithmetic, kld=float("nan")))) == [metric]
    (bound,) = (
        item for item in bounds(found(logits=logits(arithmetic)), {}, RECIPES["default"]) if item.metric == metric
    )
    assert Bound.model_validate_json(bound.model_dump_json()) == bound


@pytest.mark.parametrize(("block", "steps"), [(32, 0.5), (16, 1.0)])
def test_wider_codes_are_held_to_their_steps(block: int, steps: float) -> None:
    """Half a step where a row has one scale, a whole one where least squares may clip a block."""
    source = GridReport(bits=4, block=8, scale_dtype="f32", lossless=True)
    wider = GridReport(bits=8, block=block, scale_dtype="f16", lossless=False)
    for error, status in (
        (0.999 * steps / 127, []),
        (1.01 * steps / 127, ["weights.max_relative_error of requantized tensors"]),
    ):
        assert broken(found(tensor(exact=1, grid=wider, source_grid=source, max_relative_error=error))) == status


def test_a_narrower_dtype_that_was_asked_for_may_round() -> None:
    rounded = tensor(exact=1, grid=None, source_grid=None, source_dtype="f32", max_relative_error=2.0**-9)
    assert broken(found(rounded)) == ["weights.exact_fraction"]
    held = bounds(found(rounded), {}, RECIPES["default"], plain="bf16")
    assert all(bound.held for bound in held)
    far = tensor(exact=1, grid=None, source_grid=None, source_dtype="f32", max_relative_error=0.1)
    held = bounds(found(far), {}, RECIPES["default"], plain="bf16")
    assert [bound.metric for bound in held if not bound.held] == ["weights.max_relative_error of vectors"]
    same = tensor(exact=1, grid=None, source_grid=None, source_dtype="bf16", max_relative_error=2.0**-9)
    held = bounds(found(same), {}, RECIPES["default"], plain="bf16")
    assert [bound.metric for bound in held if not bound.held] == ["weights.exact_fraction"]
    assert TARGETS["gguf"].plain("BF16") == "bf16"
    assert TARGETS["gguf"].plain("Q4_0") is None


def test_further_arithmetics_are_held_to_their_own_bounds() -> None:
    overflown = logits("f16", kld=0.5)
    validation = found(tensor(), logits=logits(), more_logits=(overflown,))
    assert broken(validation, bf16=figures(0.003)) == ["conversion.kld_mean in f16"]


def test_the_recipes_budget_is_a_bound() -> None:
    expensive = logits().model_copy(update={"loss": figures(0.2)})
    recipe = Recipe(name="strict", max_kld=0.1)
    assert broken(found(tensor(), logits=expensive), recipe) == ["loss.kld_mean"]
    assert broken(found(tensor(), logits=expensive)) == []
