"""Language models of a few digits, for searches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DIGITS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hubert_lightning.asr.ngram import ngram


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits.arpa with digits.lexicon, of words, and letters.arpa, of letters."""
    folder = tmp_path_factory.mktemp("language")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(DIGITS, size=rng.integers(1, 6))) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join(sentences))
    ngram(folder / "text.txt", folder / "digits.arpa", order=3)
    ngram(folder / "text.txt", folder / "letters.arpa", order=4, letters=True)
    return folder


@pytest.fixture(scope="module")
def causal_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 of random weights that reads words."""
    folder = tmp_path_factory.mktemp("gpt")
    words = {word.lower(): place for place, word in enumerate(["</s>", "<unk>", *DIGITS])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(words), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
