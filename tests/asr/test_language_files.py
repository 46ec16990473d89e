"""Language models and lexicons give the same results in any form of file that other systems write."""

import base64
import bz2
import gzip
import lzma
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import ENOSPC
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.flashlight import Hypothesis
from hubert_lightning.asr.language_files import for_kenlm, read_lexicon, unigrams
from hubert_lightning.asr.lexicon import lexicon
from hubert_lightning.asr.ngram import ngram
from hubert_lightning.untrusted.text_file import decompressed, lines_of
from hubert_lightning.vocabulary import LETTERS, Vocabulary

WORDS = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "NINE", "EIGHT", "ZERO"]
# hubert-large-ls960-ft, transformers: the blank is <pad>
LARGE = Vocabulary(("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"))
# What KenLM's build_binary made of an ARPA model of <unk>, <s>, </s>, one, two and übel
BINARY = """
H4sICL1iDGsCA3AuYmluAMvNTSxQyMlVyCgpKbDS18/OSE1My0zNSdFLzs/VT85PSVVIyy/KTSxRKEstKs7Mz1Mw5WJAgAZ7ILGfEUj8BwKQCC
NUhglMHrBHFmOD0swMqICNgThwmjVl6ao/z7pYgGyunO8fa4sfZDOhqSmoU9xr2VYKtvNcpca3A/f92VmB7GWGm5SYax9EgeyeNXPmfpDjGRiO
HQKy90H90XD2jI89EO9LS0sD08bGxvvPnjmzF2Y2xyemjJaNxsIgPY1Fbz/UVte0gtRptplf2HOoWQGodh+yW2xK87LtGGyKgVgfSOTnpTKUlO
czHN6TlJrDAAA1ywp9eQEAAA==
"""
# The same of build_binary -v, which leaves out the words
WITHOUT_WORDS = """
H4sICBRjDGsCA3YuYmluAMvNTSxQyMlVyCgpKbDS18/OSE1My0zNSdFLzs/VT85PSVVIyy/KTSxRKEstKs7Mz1Mw5WJAgAZ7ILGfEUj8BwKQCC
NUhglMHrBHUszABqWZGVABGwNx4DRrytJVf551sQDZXDnfP9YWP8hmQlNTUKe417KtFOyOc5Ua3w7c92dnBbKXGW5SYq59EAWye9bMmftBjmdg
OHYIyN4H9UfD2TM+9kC8Ly0tDUwbGxvvP3vmzF6Y2RyfmDJaNhoLg/Q0Fr39UFtd0wpSp9lmfmHPoWYFoNp9yF4BALDBX89cAQAA
"""


def certain_log_probs(path: str, vocabulary: Vocabulary, blank: str = "-") -> Tensor:
    """Log-probabilities of a path with one character per frame."""
    tokens = [0 if letter == blank else vocabulary.tokens.index(letter) for letter in path]
    return one_hot(torch.tensor(tokens), len(vocabulary)).float().log().clamp(min=-12)


def random_log_probs(vocabulary: Vocabulary, utterances: int = 3, frames: int = 60) -> list[Tensor]:
    logits = 2 * torch.randn(utterances, frames, len(vocabulary), generator=torch.Generator().manual_seed(0))
    logits[..., 0] += 2
    logits[..., vocabulary.tokens.index("|")] += 2
    return list(logits.log_softmax(dim=-1))


def hypotheses_of(
    lm: Path | None, words: Path | None, vocabulary: Vocabulary, rows: Sequence[Tensor] | None = None, **other: float
) -> list[list[Hypothesis]]:
    settings = DecoderSettings(str(lm) if lm else None, str(words) if words else None, beam_size=30, num_workers=0)
    return BeamSearch(replace(settings, **other), vocabulary).nbest(rows or random_log_probs(vocabulary))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """words.arpa with words.lexicon, and letters.arpa."""
    folder = tmp_path_factory.mktemp("language")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, size=rng.integers(1, 6))) for _ in range(60)]
    (folder / "text.txt").write_text("\n".join([*sentences, "ONE 2 THREE"]))
    ngram(folder / "text.txt", folder / "words.arpa", order=3)
    ngram(folder / "text.txt", folder / "letters.arpa", order=4, letters=True)
    return folder


def with_spaces(content: bytes) -> bytes:
    return content.replace(b"\t", b" ")


TEXT_FORMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "lines of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "lines of old Macs": lambda content: content.replace(b"\n", b"\r"),
    "several of these": lambda content: gzip.compress(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"), mtime=0),
}
MODEL_FORMS = TEXT_FORMS | {
    "spaces for tabs": with_spaces,
    "a preamble": lambda content: b"made by hand\n\n" + content,
    "<UNK>": lambda content: content.replace(b"<unk>", b"<UNK>"),
    "a compressed preamble": lambda content: gzip.compress(b"made by hand\n" + content, mtime=0),
}


@pytest.mark.parametrize("form", MODEL_FORMS)
@pytest.mark.parametrize("kind", ["words", "letters"])
def test_a_language_model_in_any_form_finds_what_the_plain_one_finds(
    files: Path, tmp_path: Path, form: str, kind: str
) -> None:
    words = files / "words.lexicon" if kind == "words" else None
    (tmp_path / "lm").write_bytes(MODEL_FORMS[form]((files / f"{kind}.arpa").read_bytes()))
    assert hypotheses_of(tmp_path / "lm", words, Vocabulary()) == hypotheses_of(
        files / f"{kind}.arpa", words, Vocabulary()
    )
    assert unigrams(tmp_path / "lm") == unigrams(files / f"{kind}.arpa")


@pytest.mark.parametrize("form", TEXT_FORMS)
def test_lexicons_and_texts_in_any_form_are_read(files: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "lexicon").write_bytes(TEXT_FORMS[form]((files / "words.lexicon").read_bytes()))
    assert read_lexicon(tmp_path / "lexicon", LETTERS) == read_lexicon(files / "words.lexicon", LETTERS)
    (tmp_path / "text").write_bytes(TEXT_FORMS[form]((files / "text.txt").read_bytes()))
    ngram(tmp_path / "text", tmp_path / "lm.arpa", order=3)
    assert (tmp_path / "lm.arpa").read_text() == (files / "words.arpa").read_text()
    (tmp_path / "arpa").write_bytes(TEXT_FORMS[form]((files / "words.arpa").read_bytes()))
    lexicon(tmp_path / "arpa", tmp_path / "again")
    assert (tmp_path / "again").read_text() == (files / "words.lexicon").read_text()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_model_of_words_without_lexicon_is_refused_although_it_is_compressed(
    files: Path, tmp_path: Path, compress: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "words.arpa.gz").write_bytes(compress((files / "words.arpa").read_bytes()))
    with pytest.raises(
        ValueError, match=r"words\.arpa\.gz: knows words such as 'EIGHT', not letters; give the lexicon"
    ):
        hypotheses_of(tmp_path / "words.arpa.gz", None, Vocabulary())


def test_the_tokens_of_a_model_of_another_system_need_no_names_of_ours(files: Path) -> None:
    """hubert-large-ls960-ft has an <unk> of its own, an <s> and an </s>."""
    order = [
        LETTERS.index("-" if token == "<pad>" else token) if token in {*LETTERS, "<pad>"} else None
        for token in LARGE.tokens
    ]
    rows = [
        torch.stack([row[:, place] if place is not None else torch.full((len(row),), -40.0) for place in order], dim=1)
        for row in random_log_probs(Vocabulary())
    ]
    for lm, words in ((files / "letters.arpa", None), (files / "words.arpa", files / "words.lexicon"), (None, None)):
        ours, theirs = hypotheses_of(lm, words, Vocabulary()), hypotheses_of(lm, words, LARGE, rows)
        assert [[best.text for best in few] for few in theirs] == [[best.text for best in few] for few in ours]
        assert [best.score for [best] in theirs] == pytest.approx([best.score for [best] in ours], abs=1e-3)
    assert any(best.text for [best] in hypotheses_of(files / "letters.arpa", None, LARGE, rows))


def test_a_token_named_as_a_mark_is_unknown_to_the_language_model(files: Path) -> None:
    """A token <s> or </s> in the middle of a text is not where a sentence starts or ends."""
    [[spelled]] = hypotheses_of(files / "letters.arpa", None, LARGE, [certain_log_probs("ONE|", LARGE)], lm_weight=1.0)
    rows = certain_log_probs("ONE|", LARGE)
    rows[2] = rows[2].roll(LARGE.tokens.index("</s>") - LARGE.tokens.index("E"))
    [[marked]] = hypotheses_of(files / "letters.arpa", None, LARGE, [rows], lm_weight=1.0)
    assert marked.score < spelled.score - 3


@pytest.mark.parametrize("name", ["<space>", "▁"])
def test_the_word_boundary_may_have_another_name_in_a_model_of_letters(files: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "lm.arpa").write_text((files / "letters.arpa").read_text().replace("|", name))
    assert hypotheses_of(tmp_path / "lm.arpa", None, Vocabulary()) == hypotheses_of(
        files / "letters.arpa", None, Vocabulary()
    )
    (tmp_path / "lm.arpa").write_text((files / "letters.arpa").read_text().replace("|", "_"))
    with pytest.raises(ValueError, match=r"lm\.arpa: a language model of letters without the word boundary, one of \|"):
        hypotheses_of(tmp_path / "lm.arpa", None, Vocabulary())


def test_a_model_without_unknown_words_finds_the_others(files: Path, tmp_path: Path) -> None:
    lines = (files / "words.arpa").read_text().splitlines()
    kept = [line for line in lines if "<unk>" not in line]
    counts = {order: sum(line.count(" ") == order - 1 and "\t" in line for line in kept) for order in (1, 2, 3)}
    kept = [f"ngram {line[6]}={counts[int(line[6])]}" if line.startswith("ngram") else line for line in kept]
    (tmp_path / "lm.arpa").write_text("\n".join([*kept, ""]))
    rows = [certain_log_probs("ONE|TWO|THRE-E|", Vocabulary())]
    [[best]] = hypotheses_of(tmp_path / "lm.arpa", files / "words.lexicon", Vocabulary(), rows)
    assert best.text == "ONE TWO THREE"


def test_words_of_kenlms_binary_form_are_known(tmp_path: Path) -> None:
    packed = base64.b64decode(BINARY)
    (tmp_path / "packed").write_bytes(packed)
    (tmp_path / "binary").write_bytes(gzip.decompress(packed))
    lower = Vocabulary(("<blank>", "|", *"abcdefghijklmnopqrstuvwxyzü"), "lower", "space")
    lexicon(tmp_path / "packed", tmp_path / "lexicon", vocabulary=vocabulary_file(lower, tmp_path))
    assert (tmp_path / "lexicon").read_text() == "one\to n e |\ntwo\tt w o |\nübel\tü b e l |\n"
    rows = [certain_log_probs("one|two|", lower)]
    for name in ("packed", "binary"):
        assert unigrams(tmp_path / name) == {"one", "two", "übel"}
        [[best]] = hypotheses_of(tmp_path / name, tmp_path / "lexicon", lower, rows, lm_weight=1.0, word_score=0.0)
        assert best.text == "one two"
        # log10 of one after the start, of two after it, and of the end
        assert best.score == pytest.approx(-0.2 - 0.3 - 0.4, abs=0.01)
        with pytest.raises(ValueError, match=f"{name}: knows words such as 'one', not letters"):
            hypotheses_of(tmp_path / name, None, lower)


def test_a_binary_model_without_its_words_is_known_by_its_scores(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(base64.b64decode(WITHOUT_WORDS))
    assert unigrams(tmp_path / "binary") is None
    lower = Vocabulary(("<blank>", "|", *"abcdefghijklmnopqrstuvwxyzü"), "lower", "space")
    (tmp_path / "lexicon").write_text("one\to n e |\ntwo\tt w o |\n")
    [[best]] = hypotheses_of(
        tmp_path / "binary", tmp_path / "lexicon", lower, [certain_log_probs("one|two|", lower)], lm_weight=1.0
    )
    assert best.text == "one two"
    (tmp_path / "lexicon").write_text("cat\tc a t |\ndog\td o g |\n")
    with pytest.raises(ValueError, match="binary: knows 0 of 2 words"):
        hypotheses_of(tmp_path / "binary", tmp_path / "lexicon", lower)
    with pytest.raises(ValueError, match="binary: knows 0 of the model's 29 tokens; give the lexicon"):
        hypotheses_of(tmp_path / "binary", None, lower)
    with pytest.raises(ValueError, match="binary: KenLM's binary form without its words; give the ARPA model"):
        lexicon(tmp_path / "binary", tmp_path / "made")


def test_a_token_that_is_another_name_of_the_boundary_is_no_second_boundary(files: Path, tmp_path: Path) -> None:
    both = Vocabulary((*LETTERS, "▁"))
    rows = [torch.nn.functional.pad(row, (0, 1), value=-40.0) for row in random_log_probs(Vocabulary())]
    letters = hypotheses_of(files / "letters.arpa", None, both, rows)
    assert [few[0].text for few in letters] == [
        few[0].text for few in hypotheses_of(files / "letters.arpa", None, Vocabulary())
    ]
    (tmp_path / "lm.arpa").write_text((files / "letters.arpa").read_text().replace("|", "▁"))
    with pytest.raises(ValueError, match="without the word boundary"):
        hypotheses_of(tmp_path / "lm.arpa", None, both, rows)


def vocabulary_file(vocabulary: Vocabulary, folder: Path) -> Path:
    vocabulary.write(folder / "vocabulary.json")
    return folder / "vocabulary.json"


def test_a_lexicon_may_have_several_spellings_empty_lines_and_words_of_two(tmp_path: Path) -> None:
    (tmp_path / "lexicon").write_text(
        "\n<unk>\tU |\nHOUSE H O U S E |\n\nNEW YORK\tN E W | Y O R K |\n"
        "ÜBER\tU B E R |\nÜBER\tO V E R |\nÜBER\tO V E R |\n"
    )
    assert read_lexicon(tmp_path / "lexicon", LETTERS) == {
        "HOUSE": [[*"HOUSE|"]],
        "NEW YORK": [[*"NEW|YORK|"]],
        "ÜBER": [[*"UBER|"], [*"OVER|"]],
    }
    rows = [certain_log_probs("HOUSE|NEW|YORK|OVER|", Vocabulary()), certain_log_probs("UBER|UBER|", Vocabulary())]
    said = hypotheses_of(None, tmp_path / "lexicon", Vocabulary(), rows)
    assert [best.text for [best] in said] == ["HOUSE NEW YORK ÜBER", "ÜBER ÜBER"]


def test_a_lexicon_of_tokens_of_several_characters_is_searched_by_tokens(tmp_path: Path) -> None:
    pieces = Vocabulary(("<pad>", "|", "th", "t", "h", "e", "ca", "<unk>"), "lower")
    (tmp_path / "lexicon").write_text("the\tth e |\ncathe\tca th e |\nhet\th e t |\n")
    path = torch.tensor([pieces.tokens.index(token) for token in ("th", "e", "|", "ca", "<pad>", "th", "e", "e", "|")])
    rows = [one_hot(path, len(pieces)).float().log().clamp(min=-12)]
    assert hypotheses_of(None, tmp_path / "lexicon", pieces, rows)[0][0].text == "the cathe"


def test_words_of_a_lexicon_need_no_boundary_at_their_end(tmp_path: Path) -> None:
    """Their last letter may last for several frames, before another word, a boundary or the end."""
    (tmp_path / "lexicon").write_text("ONE\tO N E\nTWO\tT W O\n")
    paths = ["ONE|TWO|", "ONEEE|TWOO||", "-O-N-E-|-T-W-O-", "ONE|TWO"]
    hypotheses = hypotheses_of(
        None,
        tmp_path / "lexicon",
        Vocabulary(),
        [certain_log_probs(path, Vocabulary()) for path in paths],
        word_score=0,
    )
    assert [(best.text, best.score) for [best] in hypotheses] == [("ONE TWO", pytest.approx(0, abs=0.01))] * 4


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (gzip.compress(b"ONE\tO N E |\n" * 999, mtime=0)[:-20], "compressed with gzip, and corrupt"),
        (b"\x28\xb5\x2f\xfd0123", "compressed with zstd; decompress it, or compress it with gzip, bzip2 or xz"),
        (b"PK\x03\x040123", "compressed with zip; decompress it"),
        (b"ONE\tO N E |\n\xff\n", "is not UTF-8"),
        (b"ONE\tO N E |\n\tO N E |\n", "line 2: a spelling without its word"),
        (b"<unk>\tO |\n", "an empty lexicon"),
    ],
)
def test_a_file_that_is_no_lexicon_is_refused_by_name(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "a.lexicon").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.lexicon.*{sentence}"):
        hypotheses_of(None, tmp_path / "a.lexicon", Vocabulary())
    if "compressed" in sentence:
        with pytest.raises(ValueError, match=f"a.lexicon.*{sentence}"):
            hypotheses_of(tmp_path / "a.lexicon", None, Vocabulary())
        with pytest.raises(ValueError, match=f"a.lexicon.*{sentence}"):
            list(lines_of(tmp_path / "a.lexicon"))


def test_an_error_inside_the_block_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    for form, content in (("gz", gzip.compress(b"ONE", mtime=0)), ("xz", lzma.compress(b"ONE")), ("txt", b"ONE")):
        (path := tmp_path / f"words.{form}").write_bytes(content)
        for error in (OSError(ENOSPC, "No space left on device"), EOFError("of another file")):

            def read_and_fail(path: Path = path, error: Exception = error) -> None:
                with decompressed(path) as file:
                    assert file.read() == b"ONE"
                    raise error

            with pytest.raises(type(error)) as raised:
                read_and_fail()
            assert raised.value is error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_is_named_where_a_language_model_is_copied(tmp_path: Path) -> None:
    import resource

    binary = gzip.decompress(base64.b64decode(BINARY))
    (tmp_path / "lm.bin.xz").write_bytes(lzma.compress(binary + bytes(100_000)))
    arpa = "\\data\\\nngram 1=9\n\n\\1-grams:\n" + "-1 ONE\n" * 20_000
    (tmp_path / "lm.arpa").write_text(arpa)  # with spaces for tabs
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ("lm.bin.xz", "lm.arpa"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with (
                pytest.raises(
                    ValueError, match=rf"{name}: KenLM reads a temporary copy .* \(File too large\); make room"
                ),
                for_kenlm(tmp_path / name),
            ):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_letters_in_another_case_are_refused(files: Path, tmp_path: Path) -> None:
    (tmp_path / "lm.arpa").write_text((files / "letters.arpa").read_text().lower())
    with pytest.raises(
        ValueError, match=r"lm\.arpa: knows words such as 'e', not letters.*in the case of the vocabulary"
    ):
        hypotheses_of(tmp_path / "lm.arpa", None, Vocabulary())


def test_marks_in_a_text_are_no_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lower = Vocabulary(("<blank>", "|", *"<>/abcdefghijklmnopqrstuvwxyz"), "lower", "space")
    (tmp_path / "text.txt").write_text("<s> the <unk> sat </s>\n<s> the cat sat </s>\n")
    ngram(tmp_path / "text.txt", tmp_path / "lm.arpa", order=2, vocabulary=vocabulary_file(lower, tmp_path))
    assert unigrams(tmp_path / "lm.arpa") == {"the", "cat", "sat"}
    assert "the <unk>" in (tmp_path / "lm.arpa").read_text()
