"""The verb `hubert units`: units of recordings as JSON lines, for Kaldi, numpy or datasets; and of live audio."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Literal

from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.dataset_writer import check_dataset
from hubert_lightning.data.journal import Journal
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError, counted
from hubert_lightning.features.recordings import listed, of_each
from hubert_lightning.units.bit_rates import BitRates
from hubert_lightning.units.finished_units import FinishedUnits, content_of, count, journal_beside
from hubert_lightning.units.listen_units import listen_units
from hubert_lightning.units.unit_bpe import TOKENIZER, Encoding, UnitBPE, checked_bpe, encoding_of
from hubert_lightning.units.unit_extractor import WINDOW_DURATION, Units, deduplicated
from hubert_lightning.units.unit_formats import FileUnits, UnitFormat, ids_of, writer_of

FRAMES_TOGETHER = 180_000
"""Frames, an hour, of the recordings that are encoded together, whose units are written together."""


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
    bpe: int | Path | None = None,
    save_bpe: Path | None = None,
) -> int:
    """Print one unit per frame (20 ms) of recordings, or of live audio on standard input.

    Args:
        model: Model in any format, or mfcc.
        files: Audio files of any format, rate, number of channels and length, or folders of them; - for raw 16 kHz mono
            samples of 16 bits, little-endian, from standard input.
        kmeans: File of the K-means; kmeans.safetensors in the model's directory if not given.
        layer: Transformer layer, counted from 1; needed if the K-means does not state the layer it was fitted on.
        format: Output format: jsonl; kaldi, one line of an id and its units per file; npz, one array per file; dataset,
            a folder of parquet tables, without repetitions, that Hugging Face's datasets loads.
        deduplicate: Whether each run of equal units is printed once, with its duration in frames.
        output: File to write; standard output if not given. For Kaldi, durations are written to OUTPUT.durations, and
            the tokens of bpe to OUTPUT.bpe.
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
        bpe: Number of tokens of a byte-pair encoding that is trained on the units of these files, without repetitions,
            and applied to them; or the tokenizer.json of one, which is applied. Implies deduplicate.
        save_bpe: File for the encoding that is trained; OUTPUT.tokenizer.json if not given.

    Returns:
        Number of files that failed.

    Raises:
        UserError: The options contradict each other, or model and K-means do not belong together.
    """
    stream_values = {"step": step, "lookahead": lookahead, "history": history}
    stream_options = {name: seconds for name, seconds in stream_values.items() if seconds is not None}
    if Path("-") in map(Path, files):
        _check_live(
            files,
            is_of_files=deduplicate or output is not None or format != "jsonl",
            in_batches=batch_duration is not None or bool(num_workers) or window is not None,
            bpe=bpe,
        )
        listen_units(Units.from_pretrained(model, kmeans, layer, precision=precision).stream(**stream_options))
        return 0
    if stream_options:
        raise UserError("step, lookahead and history are options for standard input, not for files; leave them out")
    deduplicate = deduplicate or bpe is not None or format == "dataset"
    _check_output(format, output, deduplicate)
    trained_or_size = _checked_bpe(bpe, save_bpe, output)
    paths = listed(files)
    ids = {} if format == "jsonl" else ids_of(paths)
    extractor = Units.from_pretrained(
        model, kmeans, layer, precision=precision, window=WINDOW_DURATION if window is None else window
    )
    encoding = None if trained_or_size is None else _encoding(trained_or_size, bpe, save_bpe, output, extractor)
    is_stream = _is_stream(output)
    applied = encoding.made([]) if encoding is not None and is_stream else None

    def make(cut: Cut, frame_units: Tensor) -> FileUnits:
        file_units, durations = deduplicated(frame_units) if deduplicate else (frame_units, None)
        tokens = None if applied is None else applied.encode(file_units)
        return FileUnits(cut.id, cut.duration, file_units, durations, tokens)

    def results_of(remaining: Sequence[Path]) -> Iterator[FileUnits | RefusedFile]:
        return of_each(
            remaining, lambda groups: extractor.of_cuts(groups, batch_duration, num_workers), make, FRAMES_TOGETHER
        )

    rates = BitRates()
    if output is None or is_stream:
        with writer_of(format, output, ids, deduplicate, encoded=applied is not None) as write:
            return _write_all(results_of(paths), len(paths), _counting(write, rates), rates)
    settings = {"verb": "units", "format": format, "deduplicate": deduplicate, "precision": precision}
    with Journal(journal_beside(output), extractor.source | settings) as journal:
        made = FinishedUnits(journal, output, format, deduplicate)
        failed = _make_missing(made, paths, results_of)
        made.write([path for path in sorted(paths, key=str) if path in made], ids, rates, encoding)
    _print_rates(rates)
    return failed


def _make_missing(
    made: FinishedUnits,
    paths: Sequence[Path],
    results_of: Callable[[Sequence[Path]], Iterator[FileUnits | RefusedFile]],
) -> int:
    """Make the units that an earlier process did not finish; returns the number of files that failed."""
    missing = [path for path in paths if path not in made]
    if done := len(paths) - len(missing):
        print(
            f"hubert: skipped {done} of {counted(len(paths), 'file')}, finished before with the same model and "
            "settings",
            file=sys.stderr,
        )
    return _write_all(
        results_of(missing), len(paths), lambda result: made.journal.add(Path(result.file), **content_of(result))
    )


def _is_stream(output: Path | None) -> bool:
    """Whether the output cannot be read again: standard output, or a pipe."""
    return output is None or (output.exists() and not output.is_file())


def _check_live(files: Sequence[Path], is_of_files: bool, in_batches: bool, bpe: int | Path | None) -> None:
    """Refuse options for files where standard input is given."""
    if len(files) > 1:
        raise UserError("standard input and files: give - alone, or files alone")
    if is_of_files:
        raise UserError(
            "units of standard input are JSON lines on standard output; leave out output, format and deduplicate"
        )
    if bpe is not None:
        raise UserError(
            "bpe can join a unit with later ones, so units of standard input have no tokens; leave bpe out, or record "
            "a file"
        )
    if in_batches:
        raise UserError(
            "batch_duration, num_workers and window are options for files, not for standard input; leave them out"
        )


def _checked_bpe(bpe: int | Path | None, save_bpe: Path | None, output: Path | None) -> int | UnitBPE | None:
    """Check the options of an encoding, and read its file."""
    checked = checked_bpe(bpe, save_bpe)
    if isinstance(checked, int) and _is_stream(output):
        raise UserError(f"bpe {bpe} is trained on all units, which needs a file for them; name it with --output")
    return checked


def _encoding(
    bpe: int | UnitBPE, source: int | Path | None, save_bpe: Path | None, output: Path | None, extractor: Units
) -> Encoding:
    path = save_bpe or (output and output.with_name(f"{output.name}{TOKENIZER}"))
    return encoding_of(bpe, source, path, extractor.num_clusters, str(extractor.source["kmeans"]))


def _counting(write: Callable[[FileUnits], None], rates: BitRates) -> Callable[[FileUnits], None]:
    def counted_and_written(result: FileUnits) -> None:
        count(result, rates)
        write(result)

    return counted_and_written


def _print_rates(rates: BitRates) -> None:
    if sentence := rates.sentence():
        print(f"hubert: {sentence} (entropy)", file=sys.stderr)


def _check_output(format: UnitFormat, output: Path | None, deduplicate: bool) -> None:
    if output is not None and output.suffix == ".npz" and format != "npz":
        raise UserError(f"{output}: the format is {format}; choose --format npz, or another name")
    if output is None and (format in ("npz", "dataset") or (format == "kaldi" and deduplicate)):
        thing = "a folder" if format == "dataset" else "a file"
        name = f"{format} with durations" if format == "kaldi" else format
        raise UserError(f"{name} needs {thing}; name it with --output")
    if format == "dataset" and output is not None:
        check_dataset(output)


def _write_all(
    results: Iterator[FileUnits | RefusedFile],
    number: int,
    write: Callable[[FileUnits], object],
    rates: BitRates | None = None,
) -> int:
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
    if rates is not None:
        _print_rates(rates)
    if failed:
        print(f"hubert: {failed} of {counted(number, 'file')} failed", file=sys.stderr)
    return failed
