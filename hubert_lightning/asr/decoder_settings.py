"""Settings of a beam search: checked, read and written."""

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flashlight.lib.text.decoder import (
    CriterionType,
)

from hubert_lightning.errors import UserError
from hubert_lightning.files import write_whole
from hubert_lightning.untrusted.json_file import is_text, read_json, shown
from hubert_lightning.vocabulary import BOUNDARY

BOUNDARIES = (BOUNDARY, "<space>", "▁", "<sp>")
"""What language models of letters call the space between words."""


NUMBERS = ("lm_weight", "word_score", "silence_score", "beam_threshold", "rescorer_weight")


LARGEST_WEIGHT = 1e6


COUNTS = {"beam_size": (1, 10_000), "nbest": (1, 10_000), "num_workers": (0, 1024)}
"""What a file may set: a search keeps a hypothesis of some 60 bytes for each frame and place in the beam."""


@dataclass(frozen=True)
class DecoderSettings:
    """What a beam search looks for. Defaults: fairseq's with a 4-gram (HuBERT infer_kenlm.yaml).

    Args:
        lm: n-gram language model, ARPA or KenLM's binary form: of words with a lexicon, of letters without. Either file
            may be compressed with gzip, bzip2 or xz.
        lexicon: The words that can be said, each on a line with its letters; anything can be spelled if not given.
        lm_weight: Weight of the language model's log-probability.
        word_score: Score added for each word (of a lexicon).
        silence_score: Score added for each word boundary.
        beam_size: Hypotheses that are kept at each frame.
        beam_threshold: Distance below the best score at which hypotheses are dropped.
        nbest: Hypotheses that are returned, or that the rescorer chooses from.
        rescorer: Directory of a causal language model of transformers.
        rescorer_weight: Weight of its log-probability, which is added to the search's score.
        rescorer_case: Case of the text that it reads: "lower", "upper", or "as_written".
        num_workers: Processes that search; one for each core if not given, 0 for none.
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
    rescorer_case: Literal["lower", "upper", "as_written"] = "lower"
    num_workers: int | None = None

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= LARGEST_WEIGHT:
                raise UserError(f"{name} is {shown(value)}; it is a number, of {LARGEST_WEIGHT:.0f} at most")
        counts = self.beam_size, self.nbest, self.beam_threshold
        if all(isinstance(count, (int, float)) for count in counts) and min(counts) <= 0:
            raise UserError(
                f"beam_size {self.beam_size}, nbest {self.nbest}, beam_threshold {self.beam_threshold}; each is above 0"
            )
        for name, (least, most) in COUNTS.items():
            value = getattr(self, name)
            if value is None and name == "num_workers":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(f"{name} is {shown(value)}; it is a number from {least} to {most}")
        for name in ("lm", "lexicon", "rescorer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or "\0" in value or not is_text(value)):
                raise UserError(f"{name} is {shown(value)}; it is a path")
        if self.rescorer_case not in ("lower", "upper", "as_written"):
            raise UserError(f"rescorer_case is {shown(self.rescorer_case)}; choose lower, upper or as_written")


def settings_identity(settings: DecoderSettings) -> dict[str, Any]:
    """What a search finds depends on: the settings, and size and modification time of every file that they name."""
    files: dict[str, list[list[Any]]] = {}
    for name in (settings.lm, settings.lexicon, settings.rescorer):
        if name:
            path = Path(name)
            inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            files[os.path.abspath(path)] = [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in inside]
    return {name: value for name, value in asdict(settings).items() if name != "num_workers"} | {"files": files}


def write_settings(settings: DecoderSettings, path: Path) -> None:
    """Write settings to a JSON file."""
    write_whole(path, settings_json(settings, path))


def settings_json(settings: DecoderSettings, path: Path) -> bytes:
    """Settings as JSON; files beside its path or below are named relative to it, so that the folder can be moved."""
    content = asdict(settings)
    for key in ("lm", "lexicon", "rescorer"):
        if content[key]:
            file = Path(content[key]).resolve()
            inside = file.is_relative_to(path.parent.resolve())
            content[key] = str(file.relative_to(path.parent.resolve()) if inside else file)
    return (json.dumps(content, indent=1) + "\n").encode()


def read_settings(path: Path) -> DecoderSettings:
    """The settings in a JSON file of `hubert tune-decoder`.

    Raises:
        UserError: It is not there, or holds something else.
    """
    way_out = "make it with `hubert tune-decoder`"
    if not path.is_file():
        raise UserError(f"{path}: no such decoder; {way_out}")
    content = read_json(path, way_out, fact=": no settings of a decoder")
    known = {field.name for field in fields(DecoderSettings)}
    if not isinstance(content, dict):
        raise UserError(f"{path}: no settings of a decoder ({shown(content)} is no object of JSON); {way_out}")
    if others := sorted(content.keys() - known):
        raise UserError(f"{path}: no settings of a decoder (not {shown(others[0])}); {way_out}")
    for key in ("lm", "lexicon", "rescorer"):
        if content.get(key) and isinstance(content[key], str):
            content[key] = str(path.parent / content[key])
    try:
        return DecoderSettings(**content)
    except ValueError as error:
        raise UserError(f"{path}: no settings of a decoder ({error}); {way_out}") from error


class Hypothesis(NamedTuple):
    """A text that may have been said.

    Attributes:
        text: Text as the model prints it.
        score: Natural logarithm of the model's probability, plus the weighted scores of the rest.
        tokens: Decoded tokens, repeats collapsed and blanks dropped.
        words: Words of the lexicon, if there is one.
    """

    text: str
    score: float
    tokens: tuple[int, ...] = ()
    words: tuple[str, ...] = ()


def search_options(settings: DecoderSettings, num_tokens: int) -> dict[str, Any]:
    """The options of a search, with a lexicon or without."""
    return {
        "beam_size": settings.beam_size,
        "beam_size_token": num_tokens,
        "beam_threshold": settings.beam_threshold,
        "lm_weight": settings.lm_weight,
        "sil_score": settings.silence_score,
        "log_add": False,
        "criterion_type": CriterionType.CTC,
    }
