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
from hubert_lightning.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor  # which `hubert score` does without

CHOSEN = ("best", "last")
"""Checkpoints of a run that are tested if none is named."""
LONGEST_NAME = 100


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
        decoder = self.decoder if isinstance(self.decoder, str) else self.decoder.get("file") or "beam search"
        return {name: value for name, value in asdict(self).items() if name != "utterances"} | {"decoder": decoder}


def results_folder(
    run: Path,
    kind: str,
    manifests: Sequence[Path | str],
    decoder: Any = None,
    checkpoint: Path | str | None = None,
) -> Path:
    """The folder for the results of some manifests: `test/dev-clean`, `test/dev-clean-lm`, `test/dev-clean-average`.

    Args:
        run: Folder of the run.
        kind: "test" or "predict".
        manifests: Paths of the manifests.
        decoder: Settings file of a beam search, or its settings; none for greedy search.
        checkpoint: Checkpoint that is tested. `best.ckpt` and `last.ckpt` are not part of the name.
    """
    parts = ["+".join(_stem(path) for path in manifests)]
    if decoder is not None:
        parts.append("decoder" if is_dataclass(decoder) or isinstance(decoder, Mapping) else _stem(decoder))
    if checkpoint is not None and (stem := Path(checkpoint).stem) not in CHOSEN:
        parts.append(stem)
    name = re.sub(r"[^\w.+-]", "_", "-".join(parts))[:LONGEST_NAME]
    folder, joined = run / kind / name, joined_paths(manifests)
    if _manifest_of(folder / f"{kind}.jsonl") not in (None, joined):  # another set whose files have the same names
        folder = folder.with_name(f"{name}-{hashlib.sha256(joined.encode()).hexdigest()[:6]}")
    return folder


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
        ValueError: The disk is full, or cannot be written to.
    """
    lines = (json.dumps({**row, **origin.columns()}, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, "".join(lines).encode())


def copy_to_run(folder: Path, run: Path, names: Sequence[str]) -> None:
    """Copy results into the run's folder, where those of the newest test are."""
    for name in names:
        write_whole(run / name, (folder / name).read_bytes())


def origin_columns(path: Path) -> dict[str, Any]:
    """What made the results of a file, by its first line; empty for a file that does not say."""
    try:
        with path.open("rb") as file:
            row = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    names = Origin.__dataclass_fields__
    return {name: row[name] for name in names if name in row} if isinstance(row, dict) else {}


def _manifest_of(path: Path) -> str | None:
    return origin_columns(path).get("manifest")


def _stem(path: Path | str) -> str:
    return re.sub(r"\.(jsonl|json)(\.gz)?$", "", Path(path).name)
