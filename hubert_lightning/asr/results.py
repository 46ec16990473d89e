"""Hypotheses of a test or a prediction: where they are written, and what made them.

Each set of manifests, decoder and checkpoint has a folder of its own, so that no test replaces another's results. The
newest results are copied into the run's folder, under the same names.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubert_lightning import __version__
from hubert_lightning.files import check_regular, write_whole
from hubert_lightning.untrusted.text_file import LONGEST_LINE

if TYPE_CHECKING:
    from torch import Tensor  # which `hubert score` does without

CHOSEN = ("best", "last")
"""Checkpoints of a run that are tested if none is named."""
LONGEST_NAME = 100
SCORES = "scores.json"


@dataclass(frozen=True)
class Origin:
    """What made some hypotheses.

    Args:
        checkpoint: Path of the checkpoint; none for weights that were never saved.
        step: Optimizer step of the checkpoint.
        weights: Fingerprint of the model's weights.
        manifest: Paths of the manifests, joined by ", ".
        utterances: Fingerprint of their audio.
        decoder: "greedy", or the settings of a beam search, with the file that they were read from.
    """

    checkpoint: str | None
    step: int | None
    weights: str
    manifest: str
    utterances: str
    decoder: str | dict[str, Any] = "greedy"
    version: str = __version__

    def columns(self) -> dict[str, Any]:
        """The fields that every line of the results repeats: short ones."""
        decoder = self.decoder
        if not isinstance(decoder, str):
            settings = {name: value for name, value in decoder.items() if name != "file"}
            decoder = decoder.get("file") or decoder_name(settings)
        return {name: value for name, value in asdict(self).items() if name != "utterances"} | {"decoder": decoder}


def results_folder(
    run: Path,
    kind: str,
    manifests: Sequence[Path | str],
    decoder: Any = None,
    checkpoint: Path | str | None = None,
    whole: bool = True,
) -> Path:
    """The folder for the results of some manifests: `test/dev-clean`, `test/dev-clean-lm`, `test/dev-clean-average`.

    Another set, decoder or checkpoint that would have the same folder gets one with six digits more.

    Args:
        run: Folder of the run.
        kind: "test" or "predict".
        manifests: Paths of the manifests.
        decoder: Settings file of a beam search, or its settings; none for greedy search.
        checkpoint: Checkpoint that is tested. `best.ckpt` and `last.ckpt` are not part of the name.
        whole: Whether all utterances are tested; otherwise the name ends in "-partial".
    """
    parts = ["+".join(_stem(path) for path in manifests)]
    if decoder is not None:
        parts.append(_stem(decoder) if isinstance(decoder, (str, Path)) else "decoder")
    if checkpoint is not None and (stem := Path(checkpoint).stem) not in CHOSEN:
        parts.append(stem)
    if not whole:
        parts.append("partial")
    name = re.sub(r"[^\w.+-]", "_", "-".join(parts))[:LONGEST_NAME]
    folder = run / kind / name
    made_by = {
        "manifest": joined_paths(manifests),
        "decoder": decoder_name(decoder),
        "checkpoint": None if checkpoint is None else str(checkpoint),
    }
    there = origin_columns(folder / f"{kind}.jsonl")
    if there and any(there.get(key) != value for key, value in made_by.items()):
        digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:6]
        folder = folder.with_name(f"{name}-{digest}")
    return folder


def decoder_name(decoder: Any) -> str:
    """A decoder in one word or path: "greedy", the file of a beam search's settings, or a digest of the settings."""
    if decoder is None:
        return "greedy"
    if isinstance(decoder, (str, Path)):
        return str(decoder)
    settings = asdict(decoder) if is_dataclass(decoder) else vars(decoder) if hasattr(decoder, "__dict__") else decoder  # type: ignore[arg-type]
    return f"beam search {hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]}"


def joined_paths(manifests: Sequence[Path | str]) -> str:
    """The manifests of a set as one string."""
    return ", ".join(map(str, manifests))


def weights_fingerprint(state: "Mapping[str, Tensor]") -> str:
    """A short name that only equal weights share.

    Args:
        state: State dict of a model.
    """
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], origin: Origin) -> None:
    """Write hypotheses as JSON lines, each with what made it; the file appears whole or not at all.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    lines = (json.dumps({**row, **origin.columns()}, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, "".join(lines).encode())


def copy_to_run(folder: Path, run: Path, names: Sequence[str]) -> None:
    """Copy results into the run's folder, where those of the newest test are.

    Args:
        folder: Folder of the results.
        run: Folder of the run.
        names: Names of files. The last one is removed first and comes last, so that it never stands beside others'.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    (run / names[-1]).unlink(missing_ok=True)
    for name in names:
        write_whole(run / name, (folder / name).read_bytes())


def origin_columns(path: Path) -> dict[str, Any]:
    """What made the results of a file, by its first line; empty for a file that does not say."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline(LONGEST_LINE))
    except (OSError, ValueError, RecursionError):
        return {}
    names = Origin.__dataclass_fields__
    return {name: row[name] for name in names if name in row} if isinstance(row, dict) else {}


def _stem(path: Path | str) -> str:
    return re.sub(r"\.(jsonl|json)(\.gz)?$", "", Path(path).name)
