"""The verb `hubert units`: units of recordings as JSON lines, for Kaldi or numpy; and of live audio."""

import json
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.console import above_bar
from hubert_lightning.data.journal import Journal
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import listed, of_each
from hubert_lightning.features.stream import FrameStream, print_latency, seconds_for_a_step, seconds_of, standard_input
from hubert_lightning.files import replacing, replacing_all
from hubert_lightning.units.unit_extractor import WINDOW_DURATION, Units, deduplicated

FRAMES_TOGETHER = 180_000
"""Frames, an hour, of the recordings that are encoded together, whose units are written together."""

UnitFormat = Literal["jsonl", "kaldi", "npz"]


class FileUnits(NamedTuple):
    """Units of a recording.

    Args:
        file: Path of the recording.
        seconds: Duration of the recording.
        units: (frames,), or (runs,) without repetitions.
        durations: (runs,), frames of each run; None with repetitions.
    """

    file: str
    seconds: float
    units: Tensor
    durations: Tensor | None


def units(
    model: Path,
    files: Sequence[Path],
    kmeans: Path | None = None,
    layer: int | None = None,
    format: UnitFormat = "jsonl",
    deduplicate: bool = False,
    output: Path | None = None,
    batch_duration: float | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    num_workers: int = 0,
    window: float | None = None,
    step: float | None = None,
    lookahead: float | None = None,
    history: float | None = None,
) -> int:
    """Print one unit per 20 ms of recordings, or of live audio on standard input.

    Args:
        model: Model in any format, or mfcc.
        files: Audio files of any format, rate, number of channels and length, or folders of them; - for raw 16 kHz mono
            samples of 16 bits, little-endian, from standard input.
        kmeans: File of the K-means; kmeans.safetensors in the model's directory if not given.
        layer: Transformer layer, counted from 1; needed if the K-means does not state the layer it was fitted on.
        format: Output format: jsonl; kaldi, one line of an id and its units per file; npz, one array per file.
        deduplicate: Whether each run of equal units is printed once, with its duration in frames of 20 ms.
        output: File to write; standard output if not given. For Kaldi, durations are written to OUTPUT.durations.
            A second start skips finished recordings, also after the command was killed. A recording is encoded again
            if its audio, the model or the settings have changed (.made-OUTPUT.jsonl beside it records them).
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        precision: Numeric precision of the encoder.
        num_workers: Number of processes that read audio, besides this one.
        window: Seconds of a recording that are encoded at once, 300 if not given. Longer recordings are encoded in
            windows, which limits the memory; a few units then differ, because attention sees one window only.
        step: Seconds from one output of units to the next, for standard input; 1 if not given.
        lookahead: Seconds after a frame that the encoder sees before its unit is printed, for standard input; 1 if not
            given.
        history: Seconds before a step that the encoder sees, for standard input; 5 if not given.

    Returns:
        Number of files that failed.

    Raises:
        UserError: The options contradict each other, or model and K-means do not belong together.
    """
    stream_values = {"step": step, "lookahead": lookahead, "history": history}
    stream_options = {name: seconds for name, seconds in stream_values.items() if seconds is not None}
    if Path("-") in map(Path, files):
        if len(files) > 1:
            raise UserError("standard input and files: give - alone, or files alone")
        if deduplicate or output is not None or format != "jsonl":
            raise UserError(
                "units of standard input are JSON lines on standard output; leave out output, format and deduplicate"
            )
        if batch_duration is not None or num_workers or window is not None:
            raise UserError(
                "batch_duration, num_workers and window are options for files, not for standard input; leave them out"
            )
        _listen(Units.from_pretrained(model, kmeans, layer, precision=precision).stream(**stream_options))
        return 0
    if stream_options:
        raise UserError("step, lookahead and history are options for standard input, not for files; leave them out")
    _check_output(format, output, deduplicate)
    paths = listed(files)
    ids = {} if format == "jsonl" else _ids(paths)
    extractor = Units.from_pretrained(
        model, kmeans, layer, precision=precision, window=WINDOW_DURATION if window is None else window
    )

    def make(cut: Cut, frame_units: Tensor) -> FileUnits:
        return FileUnits(cut.id, cut.duration, *(deduplicated(frame_units) if deduplicate else (frame_units, None)))

    def rows_of(groups: Sequence[Sequence[Cut]]) -> Iterator[list[Tensor]]:
        return extractor.of_cuts(groups, batch_duration, num_workers)

    if output is None or (output.exists() and not output.is_file()):
        with _writer(format, output, ids, deduplicate) as write:
            return _write_all(of_each(paths, rows_of, make, FRAMES_TOGETHER), len(paths), write)
    settings = extractor.source | {
        "verb": "units",
        "format": format,
        "deduplicate": deduplicate,
        "precision": precision,
    }
    with Journal(_journal_beside(output), settings) as journal:
        made = _FinishedUnits(journal, output, format, deduplicate)
        missing = [path for path in paths if path not in made]
        if done := len(paths) - len(missing):
            print(
                f"hubert: skipped {done} of {len(paths)} files, finished before with the same model and settings",
                file=sys.stderr,
            )

        def keep(result: FileUnits) -> None:
            journal.add(Path(result.file), **_content(result))

        failed = _write_all(of_each(missing, rows_of, make, FRAMES_TOGETHER), len(paths), keep)
        made.write([path for path in sorted(paths, key=str) if path in made], ids)
    return failed


class _FinishedUnits:
    """Units that are known: those in the journal, or, after the verb has finished, in the output that it describes."""

    def __init__(self, journal: Journal, output: Path, format: UnitFormat, deduplicate: bool) -> None:
        self.journal, self.output, self.format, self.deduplicate = journal, output, format, deduplicate
        self._in_output = bool(journal.about) and journal.about.get("output") == self._status()

    def __contains__(self, path: Path) -> bool:
        return path in self.journal and (self._in_output or "units" in self.journal.row(path))

    def write(self, paths: Sequence[Path], ids: Mapping[str, str]) -> None:
        """Write the units of these files, unless the output consists of them."""
        names = {path: ids.get(str(path), str(path)) for path in paths}
        if (
            self._in_output
            and len(paths) == len(self.journal)
            and all(self._is_written(name, path) for path, name in names.items())
        ):
            return
        with ExitStack() as stack:
            read = stack.enter_context(_reader(self.format, self.output, self.deduplicate)) if self._in_output else None
            write = stack.enter_context(_writer(self.format, self.output, ids, self.deduplicate))
            for path in paths:
                row = self.journal.row(path)
                if read is not None and "units" not in row:
                    row |= read(row["name"])
                units, durations = (torch.tensor(row[key]) if key in row else None for key in ("units", "durations"))
                assert units is not None
                write(FileUnits(str(path), 0.0, units, durations))
        short = [self.journal.identity(path) | {"name": name} for path, name in names.items()]
        self.journal.finish(short, output=self._status())

    def _is_written(self, name: str, path: Path) -> bool:
        """Whether the output has a file's units under this name."""
        row = self.journal.row(path)
        return "units" not in row and row.get("name") == name

    def _status(self) -> list[list[int]]:
        beside = [_durations_beside(self.output)] if self.format == "kaldi" and self.deduplicate else []
        statuses = [path.stat() for path in (self.output, *beside) if path.is_file()]
        return [[status.st_size, status.st_mtime_ns] for status in statuses]


def _journal_beside(output: Path) -> Path:
    digest = sha256(os.fsencode(output.name)).hexdigest()[:8]
    name = output.name if len(output.name) < 60 else f"{output.name[:40]}-{digest}"
    return output.with_name(f".made-{name}.jsonl")


def _content(result: FileUnits) -> dict[str, list[int]]:
    content = {"units": result.units.tolist()}
    return content if result.durations is None else content | {"durations": result.durations.tolist()}


def _check_output(format: UnitFormat, output: Path | None, deduplicate: bool) -> None:
    if output is not None and output.suffix == ".npz" and format != "npz":
        raise UserError(f"{output}: the format is {format}; choose --format npz, or another name")
    if output is None and (format == "npz" or (format == "kaldi" and deduplicate)):
        raise UserError(f"{format}{' with durations' if deduplicate else ''} needs a file; name it with --output")


def _write_all(results: Iterator[FileUnits | RefusedFile], number: int, write: Callable[[FileUnits], None]) -> int:
    """Write each result, print failures and speed, and return the number of failures."""
    failed, seconds, began = 0, 0.0, perf_counter()
    for result in results:
        if isinstance(result, RefusedFile):
            failed += 1
            print(f"hubert: {result.path}: {result.reason}", file=sys.stderr, flush=True)
        else:
            seconds += result.seconds
            write(result)
    took = perf_counter() - began
    if seconds:
        print(f"hubert: {seconds:.1f} s of audio in {took:.1f} s, {seconds / took:.1f} × real time", file=sys.stderr)
    if failed:
        print(f"hubert: {failed} of {number} files failed", file=sys.stderr)
    return failed


def _ids(paths: Sequence[Path]) -> dict[str, str]:
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
def _writer(
    format: UnitFormat, output: Path | None, ids: Mapping[str, str], deduplicate: bool
) -> Iterator[Callable[[FileUnits], None]]:
    """Yield a function that writes one file's units; the output appears at the end."""
    if output is None:
        write = _lines_to(format, ids, sys.stdout.buffer)

        def print_result(result: FileUnits) -> None:
            with above_bar():
                write(result)

        yield print_result
    elif format == "npz":
        with replacing(output) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            yield lambda result: _put_arrays(archive, ids[result.file], result)
    elif format == "kaldi" and deduplicate:
        with replacing_all(_durations_beside(output), output) as (beside, file):
            yield _lines_to(format, ids, file, beside)
    else:
        with replacing(output) as file:
            yield _lines_to(format, ids, file)


def _lines_to(
    format: UnitFormat, ids: Mapping[str, str], file: BinaryIO, beside: BinaryIO | None = None
) -> Callable[[FileUnits], None]:
    def write(result: FileUnits) -> None:
        _put(file, _json(result) if format == "jsonl" else _kaldi(ids[result.file], result.units))
        if beside is not None and result.durations is not None:
            _put(beside, _kaldi(ids[result.file], result.durations))

    return write


def _durations_beside(output: Path) -> Path:
    return output.with_name(output.name + ".durations")


@contextmanager
def _reader(format: UnitFormat, output: Path, deduplicate: bool) -> Iterator[Callable[[str], dict[str, Any]]]:
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
        paths = [output, *([_durations_beside(output)] if format == "kaldi" and deduplicate else [])]
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
    arrays = (
        {name: result.units}
        if result.durations is None
        else {name: result.units, f"{name}.durations": result.durations}
    )
    for key, values in arrays.items():
        with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, values.numpy())


def _json(result: FileUnits) -> str:
    content = {"file": result.file, "units": result.units.tolist()}
    if result.durations is not None:
        content["durations"] = result.durations.tolist()
    return json.dumps(content, ensure_ascii=False)


def _kaldi(name: str, numbers: Tensor) -> str:
    return " ".join([name, *map(str, numbers.tolist())])


def _listen(stream: FrameStream) -> None:
    """Print a JSON line for every step of standard input as soon as its units are known, and the latency."""
    durations = [seconds_for_a_step(stream) for _ in range(3)][1:]  # the first one warms up
    print_latency("units come", stream, durations)
    durations.clear()
    num_units, num_samples = 0, 0

    def print_units(units: Tensor) -> None:
        nonlocal num_units
        for step in torch.split(units, stream.step):
            if len(step):
                start, end = num_units, num_units + len(step)
                times = {"start": seconds_of(start), "end": seconds_of(end)}
                print(json.dumps(times | {"units": step.tolist()}), flush=True)
                num_units = end

    for samples in standard_input():
        num_samples += len(samples)
        began = perf_counter()
        known = stream.push(samples)
        if len(known):
            durations.append((perf_counter() - began) / -(-len(known) // stream.step))
        print_units(known)
    print_units(stream.finish())
    if not num_units:
        raise UserError(f"{num_samples} samples on standard input are too short for a unit; pipe in 16 kHz mono s16le")
    print_latency("units came", stream, durations)
