"""The parts of flashlight in use exist, and give what torchaudio's decoder gives with them."""

from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.flashlight import FlashlightDecoder
from hubert_lightning.asr.language_files import read_lexicon
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.vocabulary import BLANK, LETTERS, Vocabulary

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text has no wheel for this version of Python")
import flashlight.lib.text.decoder as decoder
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
from torchaudio.models.decoder import ctc_decoder

OPTIONS = ["beam_size", "beam_size_token", "beam_threshold", "lm_weight", "sil_score", "log_add", "criterion_type"]
NAMES: list[tuple[Any, list[str]]] = [
    (decoder.CriterionType, ["CTC"]),
    (decoder.SmearingMode, ["MAX"]),
    (decoder.Trie, ["insert", "smear"]),
    (decoder.ZeroLM, ["start", "score", "finish"]),
    (decoder.LM, ["start", "score", "finish"]),
    (decoder.LMState, ["child"]),
    (decoder.LexiconDecoder, ["decode"]),
    (decoder.LexiconFreeDecoder, ["decode"]),
    (decoder.LexiconDecoderOptions, [*OPTIONS, "word_score", "unk_score"]),
    (decoder.LexiconFreeDecoderOptions, OPTIONS),
    (decoder.DecodeResult, ["tokens", "words", "score"]),
    (KenLM, ["start", "score", "finish"]),
    (Dictionary, ["get_index", "get_entry", "index_size"]),
]


@pytest.mark.parametrize(("owner", "names"), NAMES, ids=[owner.__name__ for owner, _ in NAMES])
def test_flashlight_has_the_undocumented_names_in_use(owner: Any, names: list[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, (
        f"flashlight-text {version('flashlight-text')} has no {owner.__name__}.{', '.join(missing)}: correct "
        "hubert_lightning/asr/flashlight.py, the only module that uses it, or set an upper bound for flashlight-text "
        "in pyproject.toml"
    )


@pytest.mark.parametrize("has_lexicon", [True, False])
def test_hypotheses_are_those_of_torchaudio(tmp_path: Path, has_lexicon: bool) -> None:
    words = np.random.default_rng(0).choice(["ONE", "TWO", "THREE"], size=(20, 4))
    (tmp_path / "text.txt").write_text("\n".join(map(" ".join, words)))
    ngram(tmp_path / "text.txt", tmp_path / "lm.arpa", order=2)
    # Without a lexicon, torchaudio numbers the letters of a language model otherwise than the tokens
    lm, lexicon = (str(tmp_path / "lm.arpa"), str(tmp_path / "lm.lexicon")) if has_lexicon else (None, None)
    weights: dict[str, Any] = {"lm_weight": 1.0, "word_score": 0.5, "beam_size": 20, "beam_threshold": 50.0, "nbest": 5}
    vocabulary = Vocabulary()
    ours = FlashlightDecoder(
        DecoderSettings(lm=lm, lexicon=lexicon, silence_score=-0.3, **weights),
        vocabulary,
        read_lexicon(Path(lexicon), LETTERS[1:]) if lexicon else None,
        vocabulary.boundary,
    )
    theirs = ctc_decoder(lexicon, list(LETTERS), lm, sil_score=-0.3, blank_token=LETTERS[BLANK], **weights)
    logits = 2 * torch.randn(80, len(LETTERS), generator=torch.Generator().manual_seed(0))
    log_probs = logits.log_softmax(dim=-1)
    expected = [
        (tuple(token for token in best.tokens.tolist() if token != BLANK), tuple(best.words), best.score)
        for best in theirs(log_probs[None])[0]
    ]
    found = [(best.tokens, best.words, best.score) for best in ours(log_probs)]
    sentence = (
        f"flashlight-text {version('flashlight-text')} or torchaudio {version('torchaudio')} decodes otherwise than "
        "hubert_lightning/asr/flashlight.py expects: compare FlashlightDecoder with CTCDecoder of torchaudio"
    )
    assert len(found) == len(expected) > 1, sentence
    boundary = vocabulary.boundary
    for (tokens, spoken, score), (their_tokens, their_words, their_score) in zip(found, expected, strict=True):
        inner = list(their_tokens)
        while inner and inner[-1] == boundary:
            inner.pop()
        while inner and inner[0] == boundary:
            inner.pop(0)
        assert (list(tokens), spoken, score) == (inner, their_words, their_score), sentence
    assert all(before[2] >= after[2] for before, after in pairwise(found))
