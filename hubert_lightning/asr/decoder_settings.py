"""Settings of a beam search: checked, read and written."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from hubert_lightning.errors import UserError
from hubert_lightning.untrusted.json_file import is_text, read_json, shown

RescorerCase = Literal["lower", "upper", "as_written"]
WEIGHT_NAMES = ("lm_weight", "word_score", "silence_score", "beam_threshold", "rescorer_weight")
"""Settings that are floats."""
MAX_WEIGHT = 1e6
COUNT_RANGES = {"beam_size": (1, 10_000), "nbest": (1, 10_000), "num_workers": (0, 1024)}
"""Settings that are integers, with their ranges. A search stores some 60 bytes for each frame and place in the beam."""
FILE_NAMES = ("lm", "lexicon", "rescorer")
"""Settings that are paths."""


@dataclass(frozen=True)
class DecoderSettings:
    """Files, weights and beam of a search. Defaults: those of fairseq with a 4-gram (HuBERT infer_kenlm.yaml).

    Args:
        lm: n-gram language model, in ARPA or KenLM's binary form: of words with a lexicon, of letters without one. The
            file may be compressed with gzip, bzip2 or xz.
        lexicon: Words that a hypothesis may contain, one per line with its tokens; any sequence of letters if not
            given. The file may be compressed with gzip, bzip2 or xz.
        lm_weight: Weight of the language model's log-probability.
        word_score: Score added for each word of the lexicon.
        silence_score: Score added for each word boundary.
        beam_size: Number of hypotheses kept at each frame.
        beam_threshold: Distance below the best score at which hypotheses are dropped.
        nbest: Number of hypotheses returned, or passed to the rescorer.
        rescorer: Directory of a causal language model of transformers.
        rescorer_weight: Weight of the rescorer's log-probability, which is added to the score of the search.
        rescorer_case: Case of the rescorer's input: "lower", "upper", or "as_written".
        num_workers: Number of search processes; one for each core if not given, 0 for none.
    """

    lm: str | None = None
    lexicon: str | None = None
    lm_weight: float = 2.0
    word_score: float = -1.0
    silence_score: float = 0.0
    beam_size: int = 500
    beam_threshold: float = 100.0
    nbest: int = 1
    rescorer: str | None = None
    rescorer_weight: float = 0.5
    rescorer_case: RescorerCase = "lower"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name in WEIGHT_NAMES:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= MAX_WEIGHT:
                raise UserError(f"{name} is {shown(value)}; it is a number, of {MAX_WEIGHT:.0f} at most")
        counts = self.beam_size, self.nbest, self.beam_threshold
        if all(isinstance(count, (int, float)) for count in counts) and min(counts) <= 0:
            raise UserError(
                f"beam_size {self.beam_size}, nbest {self.nbest}, beam_threshold {self.beam_threshold}; each is above 0"
            )
        for name, (least, most) in COUNT_RANGES.items():
            value = getattr(self, name)
            if value is None and name == "num_workers":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} is {shown(value)}; it is a number from {least} to {most}")
        for name in FILE_NAMES:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or "\0" in value or not is_text(value)):
                raise UserError(f"{name} is {shown(value)}; it is a path")
        if self.rescorer_case not in ("lower", "upper", "as_written"):
            raise UserError(f"rescorer_case is {shown(self.rescorer_case)}; choose lower, upper or as_written")


def settings_identity(settings: DecoderSettings) -> dict[str, object]:
    """Everything that the results of a search depend on.

    Args:
        settings: Settings of the search.

    Returns:
        The settings but for `num_workers`, and size and modification time of every file that they name.
    """
    files: dict[str, list[tuple[str, int, int]]] = {}
    for name in FILE_NAMES:
        if value := getattr(settings, name):
            path = Path(value)
            contents = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            statuses = [(file.name, file.stat()) for file in contents]
            files[os.path.abspath(path)] = [(name, status.st_size, status.st_mtime_ns) for name, status in statuses]
    return {name: value for name, value in asdict(settings).items() if name != "num_workers"} | {"files": files}


def settings_json(settings: DecoderSettings, path: Path) -> bytes:
    """Serialise settings as JSON.

    Args:
        settings: Settings to serialise.
        path: File that the JSON is for. Files in its folder or below get relative paths, so that the folder can move.
    """
    content, folder = asdict(settings), path.parent.resolve()
    for name in FILE_NAMES:
        if content[name]:
            file = Path(content[name]).resolve()
            content[name] = str(file.relative_to(folder) if file.is_relative_to(folder) else file)
    return (json.dumps(content, indent=1) + "\n").encode()


def read_settings(path: Path) -> DecoderSettings:
    """Read settings from a JSON file of `hubert tune-decoder`.

    Raises:
        UserError: The file does not exist, or has other content.
    """
    way_out = "make it with `hubert tune-decoder`"
    if not path.is_file():
        raise UserError(f"{path}: no such decoder settings file; {way_out}")
    content = read_json(path, way_out, fact=": not a decoder settings file")
    known = {field.name for field in fields(DecoderSettings)}
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a decoder settings file ({shown(content)} is not a JSON object); {way_out}")
    if unknown := sorted(content.keys() - known):
        raise UserError(f"{path}: not a decoder settings file (unknown key {shown(unknown[0])}); {way_out}")
    for name in FILE_NAMES:
        if content.get(name) and isinstance(content[name], str):
            content[name] = str(path.parent / content[name])
    try:
        return DecoderSettings(**content)
    except UserError as error:
        raise UserError(f"{path}: not a decoder settings file ({error}); {way_out}") from error
