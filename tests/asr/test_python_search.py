"""The search in Python finds what flashlight's finds, and is chosen where flashlight is not installed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hubert_lightning.asr import flashlight, python_search
from hubert_lightning.asr.arpa_model import ArpaModel
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.flashlight import FlashlightDecoder, Hypothesis
from hubert_lightning.asr.language_files import read_lexicon
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.errors import UserError
from hubert_lightning.vocabulary import BLANK, LETTERS, Vocabulary

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel for this version of Python")
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary

WORDS = ["ONE", "TWO", "THREE", "TOO", "TEN", "NET", "A", "EIGHT", "ATE"]
VOCABULARY = Vocabulary()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3-grams of words and of letters, and a lexicon."""
    folder = tmp_path_factory.mktemp("models")
    drawn = random.Random(0)
    lines = [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 6))) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(lines))
    ngram(folder / "text.txt", folder / "words.arpa", order=3)
    ngram(folder / "text.txt", folder / "letters.arpa", order=3, letters=True)
    return folder


def random_log_probs(frames: int, seed: int, peak: float) -> Tensor:
    """Log-probabilities of a random sentence's letters, blanks between them, and noise."""
    drawn = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(frames, len(LETTERS), generator=generator)
    path = [token for letter in "|".join(drawn.choices(WORDS, k=frames // 8)) for token in (BLANK, letter)]
    for frame, token in zip(range(frames), path, strict=False):
        logits[frame, token if isinstance(token, int) else LETTERS.index(token)] += peak
    return logits.log_softmax(dim=-1)


CLASSES = [
    "CriterionType", "Dictionary", "KenLM", "LexiconDecoder", "LexiconDecoderOptions", "LexiconFreeDecoder",
    "LexiconFreeDecoderOptions", "SmearingMode", "Trie", "ZeroLM",
]  # fmt: skip


def both(
    chosen: DecoderSettings, log_probs: Tensor, delimiter: int | None
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """Hypotheses of flashlight's search, and of the search in Python."""
    lexicon = read_lexicon(Path(chosen.lexicon), LETTERS[1:]) if chosen.lexicon else None
    expected = FlashlightDecoder(chosen, VOCABULARY, lexicon, delimiter)(log_probs)
    with pytest.MonkeyPatch.context() as patch:
        for name in CLASSES:
            patch.setattr(flashlight, name, getattr(python_search, name))
        return expected, FlashlightDecoder(chosen, VOCABULARY, lexicon, delimiter)(log_probs)


@pytest.mark.parametrize("kind", ["letters", "letters and n-gram", "lexicon", "lexicon and n-gram"])
@given(
    frames=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    peak=st.sampled_from([0.0, 3.0, 8.0]),
    beam=st.sampled_from([1, 5, 40, 500]),
    weights=st.tuples(st.floats(-0.5, 3), st.floats(-2, 2), st.floats(-1, 1)),
    threshold=st.sampled_from([3.0, 25.0, 100.0]),
)
@settings(max_examples=12, deadline=None)
def test_hypotheses_are_those_of_flashlight(
    models: Path,
    kind: str,
    frames: int,
    seed: int,
    peak: float,
    beam: int,
    weights: tuple[float, float, float],
    threshold: float,
) -> None:
    lm_weight, word_score, silence_score = weights
    has_lexicon, has_model = "lexicon" in kind, "n-gram" in kind
    chosen = DecoderSettings(
        lm=str(models / ("words.arpa" if has_lexicon else "letters.arpa")) if has_model else None,
        lexicon=str(models / "words.lexicon") if has_lexicon else None,
        lm_weight=lm_weight,
        word_score=word_score,
        silence_score=silence_score,
        beam_size=beam,
        beam_threshold=threshold,
        nbest=10,
    )
    expected, found = both(chosen, random_log_probs(frames, seed, peak), VOCABULARY.boundary)
    assert [best.score for best in found] == pytest.approx([best.score for best in expected], abs=2e-3)
    for ours, theirs in zip(found, expected, strict=True):
        if sum(abs(other.score - theirs.score) < 5e-3 for other in expected) == 1:  # others may change places
            assert ours[:1] + ours[2:] == theirs[:1] + theirs[2:]


@pytest.mark.parametrize("name", ["words.arpa", "letters.arpa"])
def test_scores_of_sentences_are_those_of_kenlm(models: Path, name: str) -> None:
    ours = ArpaModel(models / name)
    entries = [*sorted({words[0] for words in ours.entries} - {"<s>", "</s>", "<unk>"}), "never seen", "<unk>"]
    kenlm = KenLM(str(models / name), Dictionary(entries))
    drawn = random.Random(1)
    for _ in range(100):
        context, state = ("<s>",), kenlm.start(False)
        for index in drawn.choices(range(len(entries)), k=8):
            context, log_prob = ours.score(context, entries[index])
            state, expected = kenlm.score(state, index)
            assert log_prob == pytest.approx(expected, abs=1e-5)
        assert ours.score(context, "</s>")[1] == pytest.approx(kenlm.finish(state)[1], abs=1e-5)


def test_the_blank_can_be_the_token_between_words() -> None:
    chosen = DecoderSettings(silence_score=0.7, beam_size=30, nbest=5)
    expected, found = both(chosen, random_log_probs(50, 3, 3.0), None)
    assert [best.text for best in found] == [best.text for best in expected]
    assert [best.score for best in found] == pytest.approx([best.score for best in expected], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        ("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\t<s>\n-1\t</s>\n", "cut short"),
        ("\\data\\\nngram 1=3\n\n\\1-grams:\n-1\t<s>\n-1\t</s>\n\n\\end\\\n", "announces 3"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-1\tA\n\n\\end\\\n", "no <s>"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n-x\tA\n\n\\end\\\n", "no n-gram of 1 words"),
        ("\\data\\\nngram 1=1\n\n\\1-grams:\n0.5\tA\n\n\\end\\\n", "no n-gram of 1 words"),
        ("\\data\\\nngram 1=1\n\n\\x-grams:\n-1\tA\n\n\\end\\\n", "states no order"),
        ("mmap lm http://kheafield.com/code format version 5\n", "only flashlight-text reads"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path: Path, content: str, fact: str) -> None:
    (tmp_path / "lm.arpa").write_text(content)
    with pytest.raises(UserError, match=fact):
        ArpaModel(tmp_path / "lm.arpa")


def test_the_search_in_python_is_used_without_flashlight(models: Path) -> None:
    program = f"""
import sys
sys.modules["flashlight"] = None
import torch
from hubert_lightning.asr.flashlight import Trie
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.vocabulary import Vocabulary
settings = DecoderSettings(lm={str(models / "words.arpa")!r}, lexicon={str(models / "words.lexicon")!r}, num_workers=0)
log_probs = torch.load({str(models / "log_probs.pt")!r})
print(Trie.__module__, *BeamSearch(settings, Vocabulary())(log_probs, torch.tensor([60])))
"""
    log_probs = random_log_probs(60, 5, 8.0)[None]
    torch.save(log_probs, models / "log_probs.pt")
    chosen = DecoderSettings(lm=str(models / "words.arpa"), lexicon=str(models / "words.lexicon"), num_workers=0)
    [expected] = BeamSearch(chosen, VOCABULARY)(log_probs, torch.tensor([60]))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"hubert_lightning.asr.python_search {expected}"
    assert "beam search in Python" in run.stderr
