"""Formats of the units of recordings: JSON lines, Kaldi's text, numpy's archives, and Hugging Face datasets."""

import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from torch import Tensor

from hubert_lightning.console import above_bar
from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing, replacing_all
from hubert_lightning.units.unit_dataset import dataset_of_files

UnitFormat = Literal["jsonl", "kaldi", "npz", "dataset"]


class FileUnits(NamedTuple):
    """Units of a recording.

    Args:
        file: Path of the recording.
        seconds: Duration of the recording.
        units: (frames,), or (runs,) without repetitions.
        durations: (runs,), frames of each run; None with repetitions.
        tokens: (tokens,), tokens of the runs in an encoding; None without one.
    """

    file: str
    seconds: float
    units: Tensor
    durations: Tensor | None
    tokens: Tensor | None = None


def ids_of(paths: Sequence[Path]) -> dict[str, str]:
    """Name each file without spaces: by its stem, or by its whole path if several files have that stem.

    No name leads outside of an archive.
    """
    stems = [_joined(path.stem) for path in paths]
    times = Counter(stems)
    names = [
        _joined("/".join(part for part in path.parts if part not in ("/", ".."))) if times[stem] > 1 else stem
        for path, stem in zip(paths, stems, strict=True)
    ]
    times = Counter(names)
    if twice := next((path for path, name in zip(paths, names, strict=True) if times[name] > 1), None):
        raise UserError(f"{twice}: another file has the same name, except for spaces; rename one")
    return {str(path): name for path, name in zip(paths, names, strict=True)}


def _joined(name: str) -> str:
    return re.sub(r"\s", "_", name)


@contextmanager
def writer_of(
    format: UnitFormat, output: Path | None, ids: Mapping[str, str], deduplicate: bool, encoded: bool = False
) -> Iterator[Callable[[FileUnits], None]]:
    """Yield a function that writes one file's units; the output appears at the end.

    Args:
        format: Format of the output.
        output: File or, for a dataset, folder to write; standard output if not given.
        ids: Name of each file's units, for the formats that name them.
        deduplicate: Whether the units have durations.
        encoded: Whether the units have tokens.
    """
    if format == "dataset":
        assert output is not None
        with dataset_of_files(output, ids, encoded) as write_row:
            yield lambda result: write_row(
                result.file,
                result.units.tolist(),
                [] if result.durations is None else result.durations.tolist(),
                None if result.tokens is None else result.tokens.tolist(),
                result.seconds,
            )
    elif output is None:
        write = _lines_to(format, ids, sys.stdout.buffer)

        def print_result(result: FileUnits) -> None:
            with above_bar():
                write(result)

        yield print_result
    elif format == "npz":
        with replacing(output) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            yield lambda result: _put_arrays(archive, ids[result.file], result)
    elif format == "kaldi" and deduplicate:
        beside = [durations_beside(output), *([tokens_beside(output)] if encoded else [])]
        with replacing_all(*beside, output) as (*files, file):
            yield _lines_to(format, ids, file, files)
    else:
        with replacing(output) as file:
            yield _lines_to(format, ids, file)


def _lines_to(
    format: UnitFormat, ids: Mapping[str, str], file: BinaryIO, beside: Sequence[BinaryIO] = ()
) -> Callable[[FileUnits], None]:
    def write(result: FileUnits) -> None:
        _put(file, _json(result) if format == "jsonl" else _kaldi(ids[result.file], result.units))
        for companion, numbers in zip(beside, (result.durations, result.tokens), strict=False):
            if numbers is not None:
                _put(companion, _kaldi(ids[result.file], numbers))

    return write


def durations_beside(output: Path) -> Path:
    """The file of a Kaldi output's durations."""
    return output.with_name(output.name + ".durations")


def tokens_beside(output: Path) -> Path:
    """The file of a Kaldi output's tokens."""
    return output.with_name(output.name + ".bpe")


@contextmanager
def reader_of(format: UnitFormat, output: Path, deduplicate: bool) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Yield a function that reads one file's units by its name in an output."""
    if format == "npz":
        with np.load(output) as arrays:
            yield lambda name: {
                key: arrays[array].tolist()
                for key, array in (("units", name), ("durations", f"{name}.durations"))
                if key == "units" or deduplicate
            }
        return
    with ExitStack() as stack:
        paths = [output, *([durations_beside(output)] if format == "kaldi" and deduplicate else [])]
        files = [stack.enter_context(path.open("rb")) for path in paths]
        offsets = [_line_offsets(file, format) for file in files]

        def read(name: str) -> dict[str, Any]:
            lines = []
            for file, offset in zip(files, offsets, strict=True):
                file.seek(offset[name])
                lines.append(file.readline())
            if format == "jsonl":
                row: dict[str, Any] = json.loads(lines[0])
                return row
            return {
                key: [int(number) for number in line.split()[1:]] for key, line in zip(("units", "durations"), lines)
            }

        yield read


def _line_offsets(file: BinaryIO, format: UnitFormat) -> dict[str, int]:
    """Offset of each name's line."""
    offsets, start = {}, 0
    for line in file:
        offsets[json.loads(line)["file"] if format == "jsonl" else line.split(maxsplit=1)[0].decode()] = start
        start += len(line)
    return offsets


def _put(file: BinaryIO, line: str) -> None:
    file.write((line + "\n").encode())
    file.flush()


def _put_arrays(archive: zipfile.ZipFile, name: str, result: FileUnits) -> None:
    arrays = {name: result.units, f"{name}.durations": result.durations, f"{name}.bpe": result.tokens}
    for key, values in arrays.items():
        if values is None:
            continue
        with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, values.numpy())


def _json(result: FileUnits) -> str:
    content = {"file": result.file, "units": result.units.tolist()}
    if result.durations is not None:
        content["durations"] = result.durations.tolist()
    if result.tokens is not None:
        content["bpe"] = result.tokens.tolist()
    return json.dumps(content, ensure_ascii=False)


def _kaldi(name: str, numbers: Tensor) -> str:
    return " ".join([name, *map(str, numbers.tolist())])
