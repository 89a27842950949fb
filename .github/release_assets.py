"""Lay the artefacts of one or more runs out as the assets of a release: flat, whole files, with checksums.

A release holds files, not folders, of less than 2 GiB each. So a folder becomes a tar archive (the same bytes for the
same files), and what is larger is cut into parts that `cat` joins. The first run's artefacts are taken; of the others,
made on other machines, the reports, and whether they wrote the same bytes. Needs Python alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

PART = 1_900_000_000
SLICE = 1 << 20


def lay_out(runs: list[Path], assets: Path, part: int = PART) -> None:
    """Write the assets of `runs` into the empty folder `assets`; files above `part` bytes are cut."""
    assets.mkdir(parents=True)
    report = json.loads((runs[0] / "report.json").read_text(encoding="utf-8"))
    allowed = ("partial",) if report.get("allow_partial") else ()
    for artifact in report["artifacts"]:
        if artifact["path"] is None or artifact["status"] not in ("pass", "written", *allowed):
            continue
        source = runs[0] / artifact["path"]
        if source.is_dir():
            name = f"{report['model']['name']}-{artifact['format']}-{source.name}.tar"
            files = [runs[0] / file["path"] for file in artifact["files"]]
            _cut(_tar(files, source.parent), assets / name, part)
        else:
            with source.open("rb") as stream:
                _cut(_slices(stream), assets / source.name, part)
    for run in runs:
        for kind in ("json", "html"):
            shutil.copyfile(run / f"report.{kind}", assets / f"report-{run.name}.{kind}")
    (assets / "release-notes.md").write_text(notes(runs), encoding="utf-8")
    sums = "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(assets.iterdir()))
    (assets / "SHA256SUMS").write_text(sums, encoding="utf-8")


def notes(runs: list[Path]) -> str:
    """The notes of the release: each run's report in Markdown, and which files two runs wrote differently."""
    sums = [_sums(run / "SHA256SUMS") for run in runs]
    text = []
    for run, found in zip(runs, sums, strict=True):
        text.append(f"# {run.name}\n\n{(run / 'report.md').read_text(encoding='utf-8')}")
        if run is not runs[0]:
            both = sorted(found.keys() & sums[0].keys())
            differing = [path for path in both if found[path] != sums[0][path]]
            text.append(
                f"{len(both) - len(differing)} of {len(both)} files have the same bytes as on {runs[0].name}.\n"
            )
            text += [f"- `{path}` differs\n" for path in differing]
    joined = "Folders are tar archives; join parts with `cat NAME.part-* > NAME`.\n"
    return "\n".join([*text, joined])


def _tar(files: Iterable[Path], root: Path) -> Iterator[bytes]:
    """Files under `root` as slices of a tar archive that depends on nothing but names and bytes."""
    written = 2 * tarfile.BLOCKSIZE
    for path in sorted(files):
        header = tarfile.TarInfo(path.relative_to(root).as_posix())
        header.size, header.mode = path.stat().st_size, 0o644
        head, padding = header.tobuf(tarfile.PAX_FORMAT), -header.size % tarfile.BLOCKSIZE
        yield head
        with path.open("rb") as stream:
            yield from _slices(stream)
        yield bytes(padding)
        written += len(head) + header.size + padding
    yield bytes(2 * tarfile.BLOCKSIZE + -written % tarfile.RECORDSIZE)


def _slices(stream: IO[bytes]) -> Iterator[bytes]:
    while data := stream.read(SLICE):
        yield data


def _cut(slices: Iterable[bytes], path: Path, part: int) -> None:
    """Write slices to `path`, or to `path.part-000` and so on when they come to more than `part` bytes."""
    pieces: list[Path] = []
    room = 0
    with ExitStack() as opened:
        for data in slices:
            while data:
                if room == 0:
                    opened.close()
                    pieces.append(path.with_name(f"{path.name}.part-{len(pieces):03d}"))
                    target = opened.enter_context(pieces[-1].open("wb"))
                    room = part
                piece, data = data[:room], data[room:]
                target.write(piece)
                room -= len(piece)
    if not pieces:
        path.touch()
    elif len(pieces) == 1:
        pieces[0].rename(path)


def _sums(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Run as a script; returns the exit status."""
    parser = argparse.ArgumentParser(description="Lay out the assets of a release.")
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of gemexport; the first is released")
    parser.add_argument("-o", "--out", required=True, type=Path, help="folder to make")
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"{arguments.out}: exists already; remove it or choose another -o", file=sys.stderr)
        return 2
    lay_out(arguments.runs, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
