"""Subtitles can be read, and other formats hold every word, in any script and for words of any length."""

import json
import re
import unicodedata
from itertools import pairwise

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from hubert_lightning.asr.subtitles import SubtitleStyle
from hubert_lightning.asr.transcript_formats import FORMATS, SCHEMA, Transcript
from hubert_lightning.asr.word_times import Word
from hubert_lightning.errors import UserError

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


def captions_of(
    words: list[Word], duration: float | None = None, style: SubtitleStyle = SubtitleStyle()
) -> list[tuple[int, int, list[str]]]:
    """Start and end in milliseconds, and lines, of each subtitle."""
    srt = Transcript("a.wav", words[-1].end if duration is None else duration, "", words).to_srt(style)
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


styles = st.builds(
    SubtitleStyle,
    columns=st.integers(8, 60),
    lines=st.integers(1, 3),
    reading_speed=st.floats(5, 30),
    min_duration=st.floats(0.5, 2),
    max_duration=st.floats(2, 10),
    gap=st.floats(0, 0.3),
)


@given(timed_words(), styles)
def test_no_subtitle_breaks_the_limits_of_its_style(words: list[Word], style: SubtitleStyle) -> None:
    captions = captions_of(words, style=style)
    for start, end, lines in captions:
        assert 1 <= len(lines) <= style.lines
        assert all(line and cell_len(line) <= style.columns for line in lines)
        assert start <= end <= start + round(1000 * style.max_duration)
    for (start, end, _), (following, _, _) in pairwise(captions):
        assert (
            end == following - round(1000 * style.gap) or end < following or following - start <= 1000 * style.gap + 1
        )
        assert end <= following
    assert "".join(word.text for word in words) == re.sub(r"\s", "", "".join("".join(lines) for *_, lines in captions))


@given(timed_words(), styles)
def test_a_subtitle_lasts_until_it_is_read_unless_another_follows(words: list[Word], style: SubtitleStyle) -> None:
    captions = captions_of(words, words[-1].end + 20, style)
    starts = [start for start, _, _ in captions]
    for (start, end, lines), following in zip(captions, [*starts[1:], 10**9], strict=True):
        readable = 1000 * min(sum(map(cell_len, lines)) / style.reading_speed, style.max_duration)
        assert end - start >= max(readable, 1000 * style.min_duration) - 1 or following - end <= 1000 * style.gap + 1


def test_a_fast_subtitle_is_shown_into_the_silence_after_it() -> None:
    words = [Word("abcdefghi", 0.1 * place, 0.1 * place + 0.1, 1.0) for place in range(8)]
    assert [(start, end) for start, end, _ in captions_of(words, 10)] == [(0, 3950)]  # 79 columns, 20 a second
    followed = captions_of([*words, Word("z", 3, 4, 1.0)], 10)
    assert [(start, end) for start, end, _ in followed] == [(0, 2920), (3000, 4000)]


def test_a_subtitle_ends_in_a_pause_or_a_sentence_rather_than_between_words() -> None:
    starts = [0.3 * place + 0.4 * (place >= 7) for place in range(23)]
    assert captions_of([Word("word", start, start + 0.3, 1.0) for start in starts])[0][2] == ["word " * 6 + "word"]
    words = [Word("end." if place == 6 else "word", 0.3 * place, 0.3 * place + 0.3, 1.0) for place in range(23)]
    assert captions_of(words)[0][2][-1].endswith("end.")


def test_a_sentence_without_spaces_becomes_several_subtitles() -> None:
    """A minute of Chinese, which a model writes as one word."""
    text = "今天天气很好我们去公园散步" * 12
    captions = captions_of([Word(text, 1.0, 59.0, 1.0)])
    assert "".join("".join(lines) for *_, lines in captions) == text
    assert len(captions) == pytest.approx(58 / 6, abs=1)
    for start, end, lines in captions:
        num_characters = len("".join(lines))
        gap = 80 if end < 59_000 else 0
        assert end + gap - start == pytest.approx(1000 * 58 / len(text) * num_characters, abs=2)
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


def test_a_line_begins_neither_with_a_mark_nor_after_a_leading_vowel_or_an_opening_bracket() -> None:
    for text in ("เด็กไทยแม่โต" * 12, "今天「天气」很好（是的）" * 9):
        lines = [line for *_, lines in captions_of([Word(text, 0.0, 30.0, 1.0)]) for line in lines]
        assert len(lines) > 3
        assert not any(line[-1] in "เแโใไ「（" or line[0] in "」）็่" for line in lines)


@pytest.mark.parametrize(("mark", "columns"), [("_", 4), ("—" * 9, 4), ("_", 5), ("_", 9)])
def test_a_mark_between_words_is_shown_and_no_line_is_wider_than_it_may_be(mark: str, columns: int) -> None:
    words = (Word("abcd", 0.0, 0.5, 1.0), Word("efgh", 0.5, 1.0, 1.0), Word("(" * 7, 1.0, 1.5, 1.0))
    content = Transcript("a.wav", 2.0, f"abcd{mark}efgh {'(' * 7}", words).to_srt(SubtitleStyle(columns=columns))
    lines = [line for line in content.splitlines() if line and "-->" not in line and not line.isdigit()]
    assert "".join(lines).replace(" ", "") == f"abcd{mark}efgh{'(' * 7}"
    assert max(map(cell_len, lines)) <= columns


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


SAID = [("hello", "ann"), ("there", "ann"), ("general", "bob <b>"), ("kenobi", None)]


def spoken(pause: float = 0.0) -> Transcript:
    words = [
        Word(text, place, place + 0.8 - pause, 0.25 * (place + 1), (), speaker)
        for place, (text, speaker) in enumerate(SAID)
    ]
    return Transcript("talk.wav", 4.0, "hello there general kenobi", words)


def test_a_turn_of_a_speaker_is_a_line_of_text_and_begins_a_subtitle_with_the_name() -> None:
    transcript = spoken()
    assert [turn.text for turn in transcript.turns] == ["hello there", "general", "kenobi"]
    assert transcript.to_text() == "ann: hello there\nbob <b>: general\nkenobi\n"
    shown = [block.split("\n")[2:] for block in transcript.to_srt().strip().split("\n\n")]
    assert shown == [["ann: hello there"], ["bob <b>: general"], ["kenobi"]]
    assert transcript.to_vtt().split("\n\n") == [
        "WEBVTT",
        "00:00:00.000 --> 00:00:01.800\n<v ann>hello there",
        "00:00:02.000 --> 00:00:02.920\n<v bob &lt;b&gt;>general",
        "00:00:03.000 --> 00:00:04.000\nkenobi",
        "",
    ]


def test_a_name_too_long_for_a_line_stays_with_the_words_that_follow() -> None:
    words = [Word("well", 0.0, 0.5, 1.0, (), "the first speaker"), Word("yes", 0.5, 1.0, 1.0, (), "the first speaker")]
    style = SubtitleStyle(columns=20)
    assert captions_of(words, style=style) == [(0, 1000, ["the first", "speaker: well yes"])]


def test_a_table_has_a_row_for_each_word() -> None:
    assert spoken().to_tsv().splitlines() == [
        "start\tend\ttext\tconfidence\tspeaker",
        "0.000\t0.800\thello\t0.2500\tann",
        "1.000\t1.800\tthere\t0.5000\tann",
        "2.000\t2.800\tgeneral\t0.7500\tbob <b>",
        "3.000\t3.800\tkenobi\t1.0000\t",
    ]


def test_the_confidence_of_a_transcript_is_the_mean_of_its_letters() -> None:
    assert spoken().confidence == pytest.approx((5 * 0.25 + 5 * 0.5 + 7 * 0.75 + 6 * 1.0) / 23)
    assert Transcript("a.wav", 1.0, "", []).confidence is None


@pytest.mark.parametrize(
    "transcript",
    [
        spoken(),
        Transcript("", 4.0, "", []),
        Transcript("a", 1.0, "今", [Word("今", 0, 0.1, 0.5)], ("low rate: 8000 Hz",)),
    ],
    ids=["speakers", "silence", "remarks"],
)
def test_json_is_as_its_schema_states(transcript: Transcript) -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(transcript.to_json())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content | {"confidence": 1.5}, schema)


@pytest.mark.parametrize(
    "limits", [{"columns": 0}, {"reading_speed": float("nan")}, {"min_duration": 7.0}, {"gap": -1}]
)
def test_a_limit_out_of_range_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="give"):
        SubtitleStyle(**limits)  # type: ignore[arg-type]
