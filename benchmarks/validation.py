"""Where the time of a validation goes, out of a run's report.json: the runtimes' own seconds, and everything else.

python benchmarks/validation.py OUT/report.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gemexport.report.schema import Report, read_report


def rows(report: Report) -> list[tuple[str, float, float, dict[str, float]]]:
    """Each validated artefact: its name, seconds of its validation, those in runtimes, and all by what they went to."""
    return [
        (f"{item.format} {item.variant}", found.seconds, found.runtime_seconds, found.steps)
        for item in report.artifacts
        if (found := item.validation) is not None
    ]


def main() -> None:
    """Print a Markdown table; the last row is the run, with the reference that all artefacts share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    report = read_report(parser.parse_args().report)
    found = rows(report)
    kinds = list(dict.fromkeys(kind for *_, steps in found for kind in steps))
    print("| format | validation | in the runtime | ratio |", *(f"{kind} |" for kind in kinds))
    print("| --- |" + " ---: |" * (3 + len(kinds)))
    for name, seconds, own, steps in found:
        spent = (f"{steps.get(kind, 0):.1f} |" for kind in kinds)
        print(f"| {name} | {seconds:.1f} s | {own:.1f} s | {seconds / own if own else float('nan'):.1f} |", *spent)
    own = sum(row[2] for row in found)
    total = sum(row[1] for row in found) + (report.reference_seconds or 0)
    totals = (f"{sum(steps.get(kind, 0) for *_, steps in found):.1f} |" for kind in kinds)
    ratio = total / own if own else float("nan")
    print(f"| all, with the reference | {total:.1f} s | {own:.1f} s | {ratio:.1f} |", *totals)


if __name__ == "__main__":
    main()
