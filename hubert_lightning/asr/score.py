"""Error rates of hypotheses in Python: strings, lists of strings, transcripts, or a file of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hubert_lightning.asr.scoring import Result, Scores, read_results
from hubert_lightning.asr.scoring import score as score_results
from hubert_lightning.errors import UserError, counted

if TYPE_CHECKING:  # the verb `score` needs no torch
    from hubert_lightning.asr.transcript_formats import Transcript


def score(
    reference: str | Sequence[str] | Path,
    hypothesis: "str | Transcript | Sequence[str | Transcript] | None" = None,
    speakers: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    corpora: Sequence[str] | None = None,
) -> Scores:
    """Compute word and character error rates with 95 % confidence intervals.

    Before the comparison, texts get canonical composition (NFC), one kind of apostrophe, single spaces in place of any
    white space, and lose invisible characters; case and punctuation count.

    Args:
        reference: What was said: a text, or a list of texts; or the path of a file of results, JSON lines with
            `reference` and `hypothesis` such as the test.jsonl of `hubert test`.
        hypothesis: What was recognised: a text or transcript, or a list of them; none for a file of results.
        speakers: Speaker of each text of a list, for the scores of each.
        languages: Language of each text of a list, likewise.
        corpora: Corpus of each text of a list, likewise.

    Returns:
        The scores: `scores.words.rate`, `scores.letters.rate`, those of each utterance and of each speaker,
        language and corpus.

    Raises:
        UserError: There are more references than hypotheses or fewer, no references, or the file cannot be read.
    """
    if isinstance(reference, Path):
        if hypothesis is not None:
            raise UserError(f"{reference}: a file of results holds the hypotheses too; leave the second argument out")
        return score_results(read_results(reference))
    if hypothesis is None:
        raise UserError("references without hypotheses; give both, or the pathlib.Path of a file of results")
    references = [reference] if isinstance(reference, str) else list(reference)
    hypotheses = [hypothesis] if isinstance(hypothesis, str) or hasattr(hypothesis, "text") else list(hypothesis)
    given = {"hypotheses": hypotheses, "speakers": speakers, "languages": languages, "corpora": corpora}
    counts = {name: len(values) for name, values in given.items() if values is not None}
    if other := next((name for name, count in counts.items() if count != len(references)), None):
        raise UserError(
            f"{counted(len(references), 'reference')} and {counts[other]} {other}; give one of each for every utterance"
        )
    names = zip(*(values or [""] * len(references) for values in (speakers, languages, corpora)), strict=True)
    rows = zip(references, hypotheses, names, strict=True)
    return score_results(
        [
            Result(str(number), said, recognised if isinstance(recognised, str) else recognised.text, *of_utterance)
            for number, (said, recognised, of_utterance) in enumerate(rows)
        ]
    )
