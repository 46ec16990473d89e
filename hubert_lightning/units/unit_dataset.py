"""Units as a Hugging Face dataset: one row per recording or utterance, with runs of units and their durations."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from lhotse.cut import Cut

from hubert_lightning.data.audio_folder import transcribed
from hubert_lightning.data.dataset_writer import COLUMNS, dataset_writer
from hubert_lightning.data.languages import language_of
from hubert_lightning.data.manifest import place_of, speaker_of
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.units.label_store import LabelStore
from hubert_lightning.units.unit_bpe import Encoding
from hubert_lightning.units.unit_extractor import Runs, deduplicated

WriteRow = Callable[[str, Sequence[int], Sequence[int], Sequence[int] | None, float], None]


@contextmanager
def dataset_of_files(output: Path, ids: Mapping[str, str], encoded: bool) -> Iterator[WriteRow]:
    """Yield a function that writes the row of a file: its path, runs, their durations, tokens, and seconds.

    The text is the transcript beside the file, if there is one. Speaker and language are not known.

    Args:
        output: Folder to write.
        ids: Id of each file.
        encoded: Whether the runs have tokens.

    Raises:
        UserError: As `dataset_writer` raises.
    """
    columns = {name: kind for name, kind in COLUMNS.items() if encoded or name != "bpe"}

    @lru_cache(maxsize=1)  # the files of a folder follow each other
    def texts(folder: Path) -> dict[str, str | None]:
        paths = [Path(file) for file in ids if Path(file).parent == folder]
        return {str(path): text for path, (text, _) in transcribed(folder, paths)}

    with dataset_writer(output, columns) as write:

        def write_row(
            file: str, units: Sequence[int], durations: Sequence[int], tokens: Sequence[int] | None, seconds: float
        ) -> None:
            row = {
                "id": ids[file],
                "units": units,
                "durations": durations,
                "speaker": None,
                "text": texts(Path(file).parent).get(file),
                "duration": round(seconds, 4),
                "language": None,
                "audio": os.path.abspath(file),
            }
            write(row if tokens is None else row | {"bpe": tokens})

        yield write_row


def export_dataset(labels: LabelStore, cuts: Sequence[Cut], output: Path, encoding: Encoding | None = None) -> None:
    """Write the labels of utterances as a dataset.

    Args:
        labels: Store with labels of the utterances. Several streams have columns units_0, durations_0, units_1, ….
        cuts: Utterances.
        output: Folder to write.
        encoding: Encoding of the labels of a single stream.

    Raises:
        UserError: As `dataset_writer` raises.
    """
    bpe = None if encoding is None else encoding.made(_runs(labels, cut)[0][0] for cut in cuts)
    streams = len(labels.source.clusters)
    names = [("units", "durations")] if streams == 1 else [(f"units_{k}", f"durations_{k}") for k in range(streams)]
    columns = {"id": "string"} | {name: "[int32]" for pair in names for name in pair}
    columns |= {} if bpe is None else {"bpe": COLUMNS["bpe"]}
    columns |= {name: COLUMNS[name] for name in ("speaker", "text", "duration", "language", "audio")}
    with dataset_writer(output, columns) as write:
        for cut in cuts:
            row: dict[str, object] = {
                "id": cut.id,
                "speaker": speaker_of(cut) or None,
                "text": " ".join(segment.text for segment in cut.supervisions if segment.text) or None,
                "duration": round(cut.num_samples / SAMPLE_RATE, 4),
                "language": language_of(cut) or None,
                "audio": place_of(cut)["source"],
            }
            runs = _runs(labels, cut)
            for pair, units_and_durations in zip(names, runs, strict=True):
                row |= dict(zip(pair, (values.tolist() for values in units_and_durations), strict=True))
            write(row if bpe is None else row | {"bpe": bpe.encode(runs[0][0]).tolist()})


def _runs(labels: LabelStore, cut: Cut) -> list[Runs]:
    """Units without repetitions of each stream, and their durations."""
    return [deduplicated(torch.from_numpy(units)) for units in labels[cut.id].astype("int64")]
