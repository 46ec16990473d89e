"""Subtitles can be read, and other formats hold every word, in any script and for words of any length."""

import json
import re
import unicodedata
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hubert_lightning.asr.transcript_formats import FORMATS, Transcript
from hubert_lightning.asr.word_times import Word

scripts = st.sampled_from(["abcdefgh", "你好世界今天", "สวัสดีครับ", "かなカナ漢字", "हिन्दीमें", "e\u0301u\u0308", "👍🏽"])
texts = scripts.flatmap(lambda letters: st.text(letters, min_size=1, max_size=90))
durations = st.one_of(st.floats(0.02, 0.8), st.floats(0.02, 70.0))
gaps = st.one_of(st.just(0.0), st.floats(0.0, 2.0))


@st.composite
def timed_words(draw: st.DrawFn) -> list[Word]:
    words, time = [], 0.0
    for _ in range(draw(st.integers(1, 20))):
        start = time + draw(gaps)
        time = start + draw(durations)
        words.append(Word(draw(texts), start, time, 1.0))
    return words


def captions_of(words: list[Word], duration: float | None = None) -> list[tuple[int, int, list[str]]]:
    """Start and end in milliseconds, and lines, of each subtitle."""
    srt = FORMATS["srt"](Transcript("a.wav", words[-1].end if duration is None else duration, "", words))
    captions = []
    for number, block in enumerate(srt.strip("\n").split("\n\n"), start=1):
        index, times, *lines = block.split("\n")
        assert index == str(number)
        start, end = (
            sum(
                int(part) * size
                for part, size in zip(re.split("[:,]", time), (3_600_000, 60_000, 1000, 1), strict=True)
            )
            for time in times.split(" --> ")
        )
        captions.append((start, end, lines))
    return captions


@given(timed_words())
def test_no_subtitle_has_more_than_two_lines_of_42_columns_or_six_seconds(words: list[Word]) -> None:
    captions = captions_of(words)
    for start, end, lines in captions:
        assert 1 <= len(lines) <= 2
        assert all(line and cell_len(line) <= 42 for line in lines)
        assert start <= end <= start + 6_000
    for (_, end, _), (start, _, _) in pairwise(captions):
        assert end <= start
    assert "".join(word.text for word in words) == re.sub(r"\s", "", "".join("".join(lines) for *_, lines in captions))


@given(timed_words())
def test_a_subtitle_lasts_a_second_unless_another_follows(words: list[Word]) -> None:
    captions = captions_of(words, words[-1].end + 1)
    starts = [start for start, _, _ in captions]
    for (start, end, _), following in zip(captions, [*starts[1:], 10**9], strict=True):
        assert end - start >= 1000 or end == following


def test_a_sentence_without_spaces_becomes_several_subtitles() -> None:
    """A minute of Chinese, which a model writes as one word."""
    text = "今天天气很好我们去公园散步" * 12
    captions = captions_of([Word(text, 1.0, 59.0, 1.0)])
    assert "".join("".join(lines) for *_, lines in captions) == text
    assert len(captions) == pytest.approx(58 / 6, abs=1)
    for start, end, lines in captions:
        num_characters = len("".join(lines))
        assert end - start == pytest.approx(1000 * 58 / len(text) * num_characters, abs=2)
        assert all(cell_len(line) <= 42 for line in lines)


def test_a_word_that_lasts_too_long_is_shown_whole_and_a_sentence_in_parts() -> None:
    assert captions_of([Word("hello", 1.0, 12.0, 1.0)]) == [(1000, 7000, ["hello"])]
    for sentence in ("สวัสดีครับวันนี้", "今天天气很好", "wordsthatruntogetherinonetoken"):
        assert len(captions_of([Word(sentence, 1.0, 12.0, 1.0)])) == 2


def test_silence_is_an_empty_transcript_in_every_format() -> None:
    nothing = Transcript("a.wav", 4.0, "", [])
    assert FORMATS["srt"](nothing) == FORMATS["ctm"](nothing) == ""
    assert json.loads(FORMATS["json"](nothing))["words"] == []


def test_a_sentence_is_split_at_the_times_of_its_tokens() -> None:
    tokens = tuple(Word(text, start, start + 0.1, 1.0) for text, start in (("今", 0.0), ("天", 0.3), ("天气", 8.0)))
    sentence = Word("今天天气", 0.0, 8.1, 1.0, tokens)
    assert captions_of([sentence]) == [(0, 1000, ["今天"]), (8000, 8100, ["天气"])]


def test_a_mark_stays_with_its_letter_where_a_word_is_split() -> None:
    for text in ("ก็ที่นี่" * 20, "हिन्दी" * 20, "今天。" * 30):
        for *_, lines in captions_of([Word(text, 0.0, 5.0, 1.0)]):
            assert all(unicodedata.category(line[0])[0] not in "MP" for line in lines)


def test_four_words_a_second_fill_two_lines() -> None:
    words = [Word("longish", 0.25 * place, 0.25 * place + 0.2, 1.0) for place in range(100)]
    assert max(len(lines) for *_, lines in captions_of(words)) == 2
    assert [word for *_, lines in captions_of(words) for line in lines for word in line.split()] == ["longish"] * 100


def test_words_of_a_lexicon_with_spaces_or_nothing_in_them_keep_the_columns_of_a_ctm() -> None:
    words = [Word("NEW  YORK", 1.0, 1.9, 0.5), Word("", 2.0, 2.1, 1.0), Word("CITY", 2.5, 3.0, 1.0)]
    assert FORMATS["ctm"](Transcript("d/a b\tc.wav", 4.0, "", words)) == (
        "a_b_c 1 1.00 0.30 NEW 0.50\na_b_c 1 1.50 0.40 YORK 0.50\na_b_c 1 2.50 0.50 CITY 1.00\n"
    )
    assert captions_of(words)[0][2] == ["NEW YORK CITY"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("今天天气很好", ["今天", "天气", "很好"]),
        ("ab_cd_ab", ["ab", "cd", "ab"]),
        ("abcd", ["ab", "cd"]),
        ("今天 天气", ["今天", "天气"]),
        ("new york city", ["New York", "city"]),  # a lexicon may write words otherwise than the model
    ],
)
def test_a_subtitle_reads_as_the_text_does(text: str, words: list[str]) -> None:
    timed = [Word(word, 0.4 * place, 0.4 * place + 0.3, 1.0) for place, word in enumerate(words)]
    shown = FORMATS["srt"](Transcript("a.wav", 4.0, text, timed)).split("\n")[2]
    assert shown.lower() == text
