"""Files in `watched/` of a run folder: what a validation leaves for people to look at.

| file | content | written by |
|---|---|---|
| `units.json` | a few fixed utterances with phones, labels, predictions and masked spans | pre-training |
| `phone_clusters.json` | frames of each phone in each cluster | pre-training, if phones are known |
| `layers.jsonl` | quality of each layer's clusters, one line for each validation | `LayerQuality` |
| `transcripts.jsonl` | references and hypotheses of the newest validation | fine-tuning |

Each validation replaces the files as a whole. They name audio files, and hold no audio. `hubert report` draws them.
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular, write_whole
from hubert_lightning.untrusted.json_file import parse_json

log = logging.getLogger(__name__)

WATCHED = "watched"
"""Folder in the folder of a run."""
UNITS, PHONE_CLUSTERS, LAYERS, TRANSCRIPTS = "units.json", "phone_clusters.json", "layers.jsonl", "transcripts.jsonl"
MAX_BYTES = 2**28
"""Largest size of a file; transcripts of a thousand hours have a tenth of it."""

Phone = tuple[str, float, float]
"""Symbol, start and end in seconds from the start of the utterance."""
Span = tuple[int, int]
"""First frame and number of frames."""


@dataclass(frozen=True)
class WatchedUtterance:
    """An utterance of the validation set with its units; all times count from the start of the utterance.

    Args:
        id: Id of the cut.
        source: Path of the audio file; None for audio in an archive.
        channel: Channel of the file; None for the mean of all channels.
        start: Start of the utterance in the audio file, in seconds.
        duration: Length in seconds; a long utterance is cropped.
        speaker: Speaker; empty if unknown.
        text: Transcript; None if unknown, or if the utterance is cropped.
        phones: Symbol, start and end in seconds of each phone; None if unknown.
        labels: (streams, frames), K-means ids.
        predictions: (streams, frames), most likely cluster of each frame, with the masked frames masked.
        mask: First frame and number of frames of each masked span.
    """

    id: str
    source: str | None
    channel: int | None
    start: float
    duration: float
    speaker: str
    text: str | None
    phones: list[Phone] | None
    labels: list[list[int]]
    predictions: list[list[int]]
    mask: list[Span]


@dataclass(frozen=True)
class WatchedUnits:
    """The watched utterances of one validation.

    Args:
        step: Optimizer steps before the validation.
        hop: Seconds between frames.
        utterances: The same utterances, with the same masks, at every validation.
    """

    step: int
    hop: float
    utterances: list[WatchedUtterance]


@dataclass(frozen=True)
class PhoneClusters:
    """Frames of each phone in each cluster, over the validation set.

    Args:
        step: Optimizer steps before the validation.
        phones: (phones,), symbols.
        counts: (phones, clusters), frames; of the first stream of labels.
    """

    step: int
    phones: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class LayerRow:
    """Quality of the clusters of one layer; None where no phones are known.

    Args:
        layer: Number of the layer, counted from 1.
        pnmi: Share of the uncertainty about a phone that its cluster removes.
        phone_purity: Share of frames with the phone that is most common in their cluster.
        cluster_purity: Share of frames with the cluster that is most common for their phone.
        perplexity: Number of equally frequent clusters that would be as uncertain.
        dead: Clusters without a frame.
    """

    layer: int
    pnmi: float | None
    phone_purity: float | None
    cluster_purity: float | None
    perplexity: float
    dead: int


@dataclass(frozen=True)
class LayersOfStep:
    """Quality of all layers at one validation.

    Args:
        step: Optimizer steps before the validation.
        clusters: Clusters that the layers are judged with.
        layers: The layers, in order.
    """

    step: int
    clusters: int
    layers: list[LayerRow]

    @property
    def best(self) -> LayerRow | None:
        """The layer with the highest PNMI; None where no phones are known."""
        known = [layer for layer in self.layers if layer.pnmi is not None]
        return max(known, key=lambda layer: layer.pnmi or 0.0, default=None)


@dataclass(frozen=True)
class WatchedTranscript:
    """Reference and hypothesis of one utterance.

    Args:
        step: Optimizer steps before the validation.
        id: Id of the cut.
        source: Path of the audio file; None for audio in an archive.
        channel: Channel of the file; None for the mean of all channels.
        start: Start of the utterance in the audio file, in seconds.
        duration: Length in seconds.
        speaker: Speaker; empty if unknown.
        reference: Transcript.
        hypothesis: Output of the model.
        wer: Word errors per word of the reference.
    """

    step: int
    id: str
    source: str | None
    channel: int | None
    start: float
    duration: float
    speaker: str
    reference: str
    hypothesis: str
    wer: float


def read_units(run: Path) -> WatchedUnits | None:
    """Read the watched utterances of a run.

    Args:
        run: Folder of a run, of one iteration.

    Returns:
        The utterances of the newest validation; None if the run has none.

    Raises:
        UserError: The file is corrupt.
    """
    return _read(run, UNITS, _units)


def read_phone_clusters(run: Path) -> PhoneClusters | None:
    """Read the frames of each phone in each cluster of a run.

    Args:
        run: Folder of a run, of one iteration.

    Returns:
        The counts; None if the run has none.

    Raises:
        UserError: The file is corrupt.
    """
    return _read(run, PHONE_CLUSTERS, _phone_clusters)


def read_layers(run: Path) -> list[LayersOfStep]:
    """Read the quality of each layer's clusters of a run.

    Args:
        run: Folder of a run, of one iteration.

    Returns:
        One entry for each validation, in the order of the steps; empty if the run has none.

    Raises:
        UserError: The file is corrupt.
    """
    return sorted(_read_lines(run, LAYERS, _layers), key=lambda entry: entry.step)


def read_transcripts(run: Path) -> list[WatchedTranscript]:
    """Read the transcripts of the newest validation of a run.

    Args:
        run: Folder of a run.

    Returns:
        One entry for each utterance; empty if the run has none.

    Raises:
        UserError: The file is corrupt.
    """
    return _read_lines(run, TRANSCRIPTS, _transcript)


def write_units(run: Path, units: WatchedUnits) -> None:
    """Write the watched utterances of a validation.

    Args:
        run: Folder of the run.
        units: The utterances.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    _write(run, UNITS, [asdict(units)])


def write_phone_clusters(run: Path, counts: PhoneClusters) -> None:
    """Write the frames of each phone in each cluster.

    Args:
        run: Folder of the run.
        counts: The counts.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    _write(run, PHONE_CLUSTERS, [asdict(counts)])


def add_layers(run: Path, layers: LayersOfStep) -> None:
    """Add the quality of the layers at a validation; a resumed run replaces the entries from its step on.

    Args:
        run: Folder of the run.
        layers: Quality of all layers.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    try:
        kept = [entry for entry in read_layers(run) if entry.step < layers.step]
    except UserError as error:  # a training does not end for that
        log.warning("%s; earlier validations are left out", error)
        kept = []
    _write(run, LAYERS, map(asdict, [*kept, layers]))


def write_transcripts(run: Path, transcripts: Sequence[WatchedTranscript]) -> None:
    """Write the transcripts of a validation.

    Args:
        run: Folder of the run.
        transcripts: One entry for each utterance.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    _write(run, TRANSCRIPTS, map(asdict, transcripts))


def masked_spans(mask: Iterable[bool]) -> list[Span]:
    """Find the spans of masked frames.

    Args:
        mask: (frames,), true where masked.

    Returns:
        First frame and number of frames of each span, in order.
    """
    spans: list[Span] = []
    for frame, masked in enumerate(mask):
        if masked and spans and sum(spans[-1]) == frame:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        elif masked:
            spans.append((frame, 1))
    return spans


Content = TypeVar("Content")
Row = dict[str, Any]  # JSON values


def _write(run: Path, name: str, rows: Iterable[Row]) -> None:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_whole(run / WATCHED / name, "".join(lines).encode())


def _read(run: Path, name: str, build: Callable[[Row], Content]) -> Content | None:
    return next(iter(_read_lines(run, name, build)), None)


def _read_lines(run: Path, name: str, build: Callable[[Row], Content]) -> list[Content]:
    path = Path(run) / WATCHED / name
    if not path.exists():
        return []
    return [*_built(path, build)]


def _built(path: Path, build: Callable[[Row], Content]) -> Iterator[Content]:
    way_out = "remove it; the next validation of the run writes it again"
    for number, line in enumerate(read_regular(path, MAX_BYTES).splitlines(), start=1):
        try:
            yield build(parse_json(line))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path}: line {number} is corrupt ({reason}); {way_out}") from error


def _units(row: Row) -> WatchedUnits:
    return WatchedUnits(int(row["step"]), float(row["hop"]), [*map(_utterance, row["utterances"])])


def _utterance(row: Row) -> WatchedUtterance:
    phones = row["phones"]
    return WatchedUtterance(
        **_place(row),
        text=None if row["text"] is None else str(row["text"]),
        phones=None if phones is None else [(str(name), float(start), float(end)) for name, start, end in phones],
        labels=_integers(row["labels"]),
        predictions=_integers(row["predictions"]),
        mask=[(int(first), int(length)) for first, length in row["mask"]],
    )


def _place(row: Row) -> dict[str, Any]:
    """The fields that name an utterance and its audio."""
    return {
        "id": str(row["id"]),
        "source": None if row["source"] is None else str(row["source"]),
        "channel": None if row["channel"] is None else int(row["channel"]),
        "start": float(row["start"]),
        "duration": float(row["duration"]),
        "speaker": str(row["speaker"]),
    }


def _phone_clusters(row: Row) -> PhoneClusters:
    phones, counts = [*map(str, row["phones"])], _integers(row["counts"])
    if len(phones) != len(counts) or len({*map(len, counts)}) > 1:
        raise ValueError(f"{len(phones)} phones have {len(counts)} rows of counts, or rows of several lengths")
    return PhoneClusters(int(row["step"]), phones, counts)


def _layers(row: Row) -> LayersOfStep:
    layers = [
        LayerRow(
            layer=int(layer["layer"]),
            pnmi=_share(layer["pnmi"]),
            phone_purity=_share(layer["phone_purity"]),
            cluster_purity=_share(layer["cluster_purity"]),
            perplexity=float(layer["perplexity"]),
            dead=int(layer["dead"]),
        )
        for layer in row["layers"]
    ]
    return LayersOfStep(int(row["step"]), int(row["clusters"]), layers)


def _transcript(row: Row) -> WatchedTranscript:
    return WatchedTranscript(
        **_place(row),
        step=int(row["step"]),
        reference=str(row["reference"]),
        hypothesis=str(row["hypothesis"]),
        wer=float(row["wer"]),
    )


def _share(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _integers(rows: list[list[int]]) -> list[list[int]]:
    return [[*map(int, row)] for row in rows]
