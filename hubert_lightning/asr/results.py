"""Files with the hypotheses of a test or a prediction: folder, content and origin.

Each set of manifests, decoder and checkpoint has a folder of its own, so that no test replaces the results of another.
The newest results are copied into the run's folder, under the same names.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubert_lightning import __version__
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.errors import UserError
from hubert_lightning.files import check_regular, write_whole
from hubert_lightning.untrusted.json_file import parse_json
from hubert_lightning.untrusted.text_file import LONGEST_LINE

DEFAULT_CHECKPOINTS = ("best", "last")
"""Stems of the checkpoints that are tested if none is named."""
MAX_FOLDER_NAME = 100
"""Characters."""
SCORES = "scores.json"


@dataclass(frozen=True)
class Origin:
    """Origin of a file of hypotheses.

    Args:
        checkpoint: Path of the checkpoint; None for weights that were never saved.
        step: Optimizer step of the checkpoint.
        weights: Fingerprint of the model's weights.
        manifest: Paths of the manifests, joined by ", ".
        utterances: Fingerprint of their audio.
        decoder: "greedy", or the settings of a beam search with the path of their file.
        version: Version of this package.
    """

    checkpoint: str | None
    step: int | None
    weights: str
    manifest: str
    utterances: str
    decoder: str | dict[str, Any] = "greedy"  # JSON values
    version: str = __version__

    def columns(self) -> dict[str, Any]:  # JSON values
        """Short fields, which every line of the results repeats."""
        decoder = self.decoder
        if not isinstance(decoder, str):
            settings = {name: value for name, value in decoder.items() if name != "file"}
            decoder = decoder.get("file") or decoder_name(settings)
        return {name: value for name, value in asdict(self).items() if name != "utterances"} | {"decoder": decoder}


def results_folder(
    run: Path,
    kind: str,
    manifests: Sequence[Path | str],
    decoder: object = None,
    checkpoint: Path | str | None = None,
    whole: bool = True,
) -> Path:
    """Name the folder for results: `test/dev-clean`, `test/dev-clean-lm`, `test/dev-clean-average`.

    If another set, decoder or checkpoint has a folder of that name already, six hexadecimal digits are added.

    Args:
        run: Folder of the run.
        kind: "test" or "predict".
        manifests: Paths of the manifests.
        decoder: Settings file of a beam search, or its settings; None for greedy decoding.
        checkpoint: Checkpoint that is tested. `best.ckpt` and `last.ckpt` are not part of the name.
        whole: Whether all utterances are tested; otherwise the name ends in "-partial".
    """
    parts = ["+".join(_stem(path) for path in manifests)]
    if decoder is not None:
        parts.append(_stem(decoder) if isinstance(decoder, (str, Path)) else "decoder")
    if checkpoint is not None and (stem := Path(checkpoint).stem) not in DEFAULT_CHECKPOINTS:
        parts.append(stem)
    if not whole:
        parts.append("partial")
    name = re.sub(r"[^\w.+-]", "_", "-".join(parts))[:MAX_FOLDER_NAME]
    folder = run / kind / name
    made_by = {
        "manifest": joined_paths(manifests),
        "decoder": decoder_name(decoder),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    earlier = origin_columns(folder / f"{kind}.jsonl")
    if earlier and any(earlier.get(key) != value for key, value in made_by.items()):
        folder = folder.with_name(f"{name}-{_six_digits(made_by)}")
    return folder


def decoder_name(decoder: object) -> str:
    """Name a decoder: "greedy", the file of a beam search's settings, or a digest of the settings.

    Args:
        decoder: None for greedy decoding; otherwise a path, `DecoderSettings`, a namespace or a mapping of settings.
    """
    if decoder is None:
        return "greedy"
    if isinstance(decoder, (str, Path)):
        return str(decoder)
    if isinstance(decoder, DecoderSettings):
        decoder = asdict(decoder)
    return f"beam search {_six_digits(vars(decoder) if hasattr(decoder, '__dict__') else decoder)}"


def _six_digits(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]


def joined_paths(manifests: Sequence[Path | str]) -> str:
    """Join the paths of manifests to one string."""
    return ", ".join(map(str, manifests))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], origin: Origin) -> None:
    """Write hypotheses as JSON lines; the file appears whole or not at all.

    Args:
        path: File to write.
        rows: Values of each utterance by their names.
        origin: What produced the hypotheses, repeated in each line.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    lines = (json.dumps({**row, **origin.columns()}, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, "".join(lines).encode())


def copy_to_run(folder: Path, run: Path, names: Sequence[str]) -> None:
    """Copy the newest results into the run's folder.

    Args:
        folder: Folder of the results.
        run: Folder of the run.
        names: Names of files. The old file with the last name is removed first, and the new one is copied last, so
            that it is never beside files of another test.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    (run / names[-1]).unlink(missing_ok=True)
    for name in names:
        write_whole(run / name, (folder / name).read_bytes())


def origin_columns(path: Path) -> dict[str, Any]:
    """Read what produced a file of results from its first line.

    Args:
        path: JSON lines of `write_rows`.

    Returns:
        Values of `Origin` by their names; empty for a file that does not exist or is from another program.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            row = parse_json(file.readline(LONGEST_LINE))
    except (OSError, UserError, json.JSONDecodeError):
        return {}
    names = Origin.__dataclass_fields__
    return {name: row[name] for name in names if name in row} if isinstance(row, dict) else {}


def _stem(path: Path | str) -> str:
    return re.sub(r"\.(jsonl|json)(\.gz)?$", "", Path(path).name)
