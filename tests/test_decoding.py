import json
from itertools import groupby

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import one_hot
from transformers import Wav2Vec2CTCTokenizer

from hubert_lightning.data.text import BLANK, LETTERS, Vocabulary, normalise
from hubert_lightning.decoding import greedy

letters = Vocabulary(LETTERS)
paths = st.lists(st.integers(0, len(LETTERS) - 1), min_size=1, max_size=40)


def certain(path: list[int]) -> torch.Tensor:
    return one_hot(torch.tensor(path, dtype=torch.int64), len(LETTERS)).float().log()[None]


def spell(path: list[int]) -> str:
    """The collapse of CTC, written out."""
    kept = [token for token, _ in groupby(path) if token != BLANK]
    return normalise(letters.decode(kept))


@given(st.text("ABEL' ", max_size=30), st.integers(1, 3))
def test_text_with_blanks_between_its_letters_decodes_to_itself(text, repeats):
    text = normalise(text)
    path = [BLANK]
    for token in letters.encode(text):
        path += [token] * repeats + [BLANK]
    assert greedy(certain(path), torch.tensor([len(path)]), letters) == [text]


@given(paths)
def test_repeats_collapse_before_blanks_are_dropped(path):
    assert greedy(certain(path), torch.tensor([len(path)]), letters) == [spell(path)]


def test_any_path_reads_as_transformers_reads_it(tmp_path):
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text(json.dumps({token: place for place, token in enumerate(LETTERS)}))
    tokenizer = Wav2Vec2CTCTokenizer(vocabulary, pad_token="-", word_delimiter_token="|", unk_token="-", bos_token=None)
    logits = torch.randn(20, 60, len(LETTERS), generator=torch.Generator().manual_seed(0))
    logits[..., :2] += 2  # blanks and word boundaries, more often than by chance
    ours = greedy(logits, torch.full((20,), 60), letters)
    theirs = [tokenizer.decode(path) for path in logits.argmax(dim=-1)]
    assert ours == [normalise(text) for text in theirs]
    assert any(" " in text for text in ours)


@given(st.lists(paths, min_size=2, max_size=4))
def test_padding_says_nothing(batch):
    longest = max(map(len, batch))
    padded = torch.cat([certain(path + [5] * (longest - len(path))) for path in batch])
    assert greedy(padded, torch.tensor([len(path) for path in batch]), letters) == [spell(path) for path in batch]


def test_blanks_alone_are_no_words():
    assert greedy(certain([BLANK, BLANK]), torch.tensor([2]), letters) == [""]
    assert greedy(certain([2]), torch.tensor([0]), letters) == [""]
