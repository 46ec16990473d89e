"""`hubert phones`: transcripts to TextGrids, by pocketsphinx and espeak-ng."""

import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import RECORDINGS, needs_recordings, refused, run_verb
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet
from lhotse.cut import Cut

pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed; install hubert-lightning[phones]")

from hubert_lightning.data import forced_alignment
from hubert_lightning.data.alignments import phones_of
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.forced_alignment import Aligned, Aligner, Failure, Speech, align_each
from hubert_lightning.data.manifest import read_manifest, write_manifest
from hubert_lightning.data.phone_sets import ARPABET, check_one_phone_set, phone_set_of
from hubert_lightning.data.phones import _names
from hubert_lightning.data.prepare import prepare_librispeech
from hubert_lightning.data.pronunciation import (
    ARPABET_OF_ESPEAK,
    ENGLISH,
    Pronunciations,
    check_english,
    dictionary_words,
)
from hubert_lightning.data.textgrids import read_textgrid
from hubert_lightning.errors import UserError
from hubert_lightning.frames import SAMPLE_RATE, num_frames
from hubert_lightning.units.quality import frame_phones


@pytest.fixture(scope="module")
def english() -> Pronunciations:
    return Pronunciations(dictionary_words())


@pytest.fixture(scope="module")
def aligner() -> Aligner:
    return Aligner()


@pytest.fixture
def folder(tmp_path: Path, train_cuts: CutSet) -> Path:
    """Two short recordings with their transcripts, in a folder and its subfolder."""
    for name, cut in zip(["a", "sub/b"], sorted(train_cuts, key=lambda cut: cut.duration), strict=False):
        path = tmp_path / "recordings" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, read_waveform(cut).numpy(), SAMPLE_RATE)
        path.with_suffix(".txt").write_text(cut.supervisions[0].text)
    return tmp_path / "recordings"


def speech_of(cut: Cut, english: Pronunciations, text: str | None = None) -> Speech:
    words = english.words(text or cut.supervisions[0].text)
    samples = (read_waveform(cut) * 32767).short().numpy().tobytes()
    return Speech(samples, [word.entry for word in words], {word.entry: word.phones for word in words if word.phones})


def without_phones(cuts: Sequence[Cut], text: str | None = None) -> list[Cut]:
    """The cuts with their transcripts, or with another one, alone."""
    return [
        replace(cut, supervisions=[replace(cut.supervisions[0], alignment=None, text=text or cut.supervisions[0].text)])
        for cut in cuts
    ]


def ends_at(times: Sequence[tuple[float, float, object]], seconds: float) -> bool:
    edges = [0.0, *(end for _, end, _ in times)]
    return [start for start, _, _ in times] == pytest.approx(edges[:-1]) and abs(edges[-1] - seconds) < 0.011


def test_a_folder_becomes_textgrids_and_a_manifest_with_phones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, manifest = tmp_path / "textgrids", tmp_path / "aligned.jsonl.gz"
    command = ["phones", folder, out, "--manifest", manifest, "--num_workers", 2]
    assert run_verb(*command) == 0
    cuts = list(read_manifest(manifest))
    assert [cut.id for cut in cuts] == ["a.wav", "sub/b.wav"]
    for cut, name in zip(cuts, ["a", "sub/b"], strict=True):
        tiers = read_textgrid(out / f"{name}.TextGrid")
        assert {symbol for *_, symbol in tiers["phones"]} <= ARPABET | {"sil"}
        spoken = [word.symbol for word in tiers["words"] if word.symbol]
        assert spoken == ENGLISH.normalise(cut.supervisions[0].text).split()
        assert phones_of(cut) == [
            (round(start, 8), round(end - start, 8), symbol) for start, end, symbol in tiers["phones"]
        ]
        assert tiers["phones"][-1].end == pytest.approx(cut.duration)
    capsys.readouterr()
    before = (out / "a.TextGrid").stat().st_mtime_ns
    (folder / "sub" / "b.txt").write_text("one two three four five six seven eight nine ten " * 8)
    assert run_verb(*command) == 1
    printed = capsys.readouterr()
    assert "skipped 1 of 2 utterances" in printed.err
    assert "sub/b.wav: the words do not fit the audio" in printed.out
    assert "the words do not fit" in (out / "refused.tsv").read_text()
    assert (out / "a.TextGrid").stat().st_mtime_ns == before
    assert not (out / "sub" / "b.TextGrid").exists()
    assert [bool(phones_of(cut)) for cut in read_manifest(manifest)] == [True, False]


def test_a_table_is_aligned_and_a_file_that_is_no_audio_does_not_end_the_rest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "broken.wav").write_bytes(b"RIFF no audio")
    text = (folder / "a.txt").read_text()
    table = tmp_path / "table.csv"
    table.write_text(f"path,text\nrecordings/a.wav,{text}\nrecordings/broken.wav,hello there\n")
    assert run_verb("phones", table, tmp_path / "out", "--num_workers", 1) == 1
    assert "broken.wav" in capsys.readouterr().out
    assert (tmp_path / "out" / "recordings" / "a.TextGrid").is_file()


def test_phones_are_where_the_synthesizer_put_them(
    train_cuts: CutSet, english: Pronunciations, aligner: Aligner
) -> None:
    """espeak-ng states the phones of its speech in its own symbols: silence, and changes of phones, must agree."""
    cut = min(train_cuts, key=lambda cut: cut.duration)
    aligned = aligner(speech_of(cut, english))
    assert isinstance(aligned, Aligned)
    assert ends_at(aligned.phones, cut.duration)
    assert ends_at(aligned.words, cut.duration)
    truth = [start for start, _, symbol in phones_of(cut) if symbol != "sil"]
    starts = np.array([start for start, _, symbol in aligned.phones if symbol != "sil"])
    near = [np.abs(starts - start).min() < 0.04 for start in truth]
    assert np.mean(near) > 0.7


def test_long_audio_is_aligned_in_pieces_as_its_parts_are(
    train_cuts: CutSet, english: Pronunciations, aligner: Aligner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = sorted(train_cuts, key=lambda cut: cut.duration)[:4]
    speeches = [speech_of(cut, english) for cut in cuts]
    joined = Speech(
        b"".join(speech.samples for speech in speeches), [word for speech in speeches for word in speech.entries], {}
    )
    whole = aligner(joined)
    monkeypatch.setattr(forced_alignment, "LONGEST", 4.0)
    monkeypatch.setattr(forced_alignment, "SHORTEST_PIECE", 2.0)
    num_pieces = len(aligner._pieces(0, joined))
    pieces = aligner(joined)
    assert isinstance(whole, Aligned)
    assert isinstance(pieces, Aligned)
    assert num_pieces > 2
    assert ends_at(pieces.phones, len(joined.samples) / 2 / SAMPLE_RATE)
    assert [index for *_, index in pieces.words if index >= 0] == list(range(len(joined.entries)))
    centres = np.arange(0.005, whole.phones[-1][1], 0.01)
    symbols = [
        np.array(phones)[np.searchsorted([end for _, end, _ in times], centres).clip(max=len(times) - 1)]
        for times in (whole.phones, pieces.phones)
        for phones in [[symbol for *_, symbol in times]]
    ]
    assert (symbols[0] == symbols[1]).mean() > 0.95


@given(
    lengths=st.lists(st.tuples(st.integers(1, 120), st.booleans()), min_size=1, max_size=60),
)
def test_cuts_of_long_audio_leave_every_word_whole_and_in_one_piece(lengths: list[tuple[int, bool]]) -> None:
    words, start, index = [], 0, 0
    for length, is_word in lengths:
        words.append((start, start + 20 * length, index if is_word else -1))
        index += is_word
        start += 20 * length
    frames = [frame for frame, _ in forced_alignment._cuts(words)]
    assert frames == sorted(set(frames))
    for frame, next_word in forced_alignment._cuts(words):
        assert 0 < frame < start
        for begin, end, word in words:
            if word >= 0:
                assert end <= frame if word < next_word else begin >= frame


def test_an_utterance_on_which_the_aligner_crashes_does_not_end_the_others(
    train_cuts: CutSet, english: Pronunciations
) -> None:
    good = speech_of(min(train_cuts, key=lambda cut: cut.duration), english)
    results = dict(align_each([("first", good), ("crash", _Crash(*good)), ("last", good)], 1))
    assert list(results) == ["first", "crash", "last"]
    assert isinstance(results["first"], Aligned)
    assert results["first"] == results["last"]
    assert isinstance(results["crash"], Failure)
    assert results["crash"].reason.startswith("pocketsphinx crashed on it (status 3); cut the recording into shorter")


class _Crash(Speech):
    """Speech that ends the process that reads it."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (3,)


class _Kill(Speech):
    """Speech whose process is ended by a signal."""

    number = signal.SIGKILL

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return signal.raise_signal, (self.number,)


class _Terminate(_Kill):
    number = signal.SIGTERM


class _Abort(_Kill):
    number = signal.SIGABRT


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (_Kill, "was killed, as the system does when memory runs out; give the command more memory, or cut"),
        (_Terminate, "was ended by SIGTERM; start the command again"),
        (_Abort, r"pocketsphinx crashed on it \(SIGABRT\)"),
    ],
)
def test_the_end_of_a_process_is_blamed_on_what_ended_it(kind: type[_Kill], sentence: str) -> None:
    result = forced_alignment._alone(kind(b"", [], {}))
    assert isinstance(result, Failure)
    assert re.search(sentence, result.reason)


def test_no_process_is_left_of_an_utterance_that_is_aligned_alone(train_cuts: CutSet, english: Pronunciations) -> None:
    before = set(multiprocessing.process._children)  # type: ignore[attr-defined]  # active_children() would join them
    speech = speech_of(min(train_cuts, key=lambda cut: cut.duration), english)
    assert isinstance(forced_alignment._alone(speech), Aligned)
    assert set(multiprocessing.process._children) == before  # type: ignore[attr-defined]


def test_an_utterance_whose_audio_is_too_short_for_its_words_has_no_alignment(
    train_cuts: CutSet, english: Pronunciations, aligner: Aligner
) -> None:
    cut = min(train_cuts, key=lambda cut: cut.duration)
    result = aligner(speech_of(cut, english, "a transcript of another recording which is far longer than this " * 5))
    assert result == forced_alignment.UNALIGNED
    assert isinstance(result, Failure)


def test_words_outside_of_the_dictionary_have_phones_of_english(english: Pronunciations) -> None:
    assert " ".join(english.spelled("helstone")) == "HH EH L S T OW N"
    assert " ".join(english.spelled("aberration")) == "AE B ER EY SH AH N"
    assert " ".join(english.spelled("letter")) == "L EH T ER"
    words = english.words("At 5%, “Café” O’Nuzhatts' well-known NAÏVE words: 'tis so—3 of them!")
    assert [word.text for word in words] == [
        *("at", "five", "percent", "café", "o'nuzhatts'", "well", "known", "naïve", "words", "'tis"),
        *("so", "three", "of", "them"),
    ]
    assert [word.text for word in words if word.phones] == ["o'nuzhatts'"]
    assert {symbol for phones in ARPABET_OF_ESPEAK.values() for symbol in phones.split()} <= ARPABET


def test_phones_of_espeak_agree_with_the_dictionary(english: Pronunciations) -> None:
    """A word error rate of phones of 10 % is what rules of spelling reach on names; common words have less."""
    pronounced = {
        "mountain": "M AW N T AH N", "singer": "S IH NG ER", "nation": "N EY SH AH N", "measure": "M EH ZH ER",
        "bottle": "B AA T AH L", "hughes": "HH Y UW Z", "boy": "B OY", "father": "F AA DH ER", "caught": "K AO T",
        "judge": "JH AH JH", "think": "TH IH NG K", "year": "Y IH R", "hoarse": "HH AO R S", "cow": "K AW",
    }  # fmt: skip
    errors = [
        symbol != expected
        for word, phones in pronounced.items()
        for symbol, expected in zip(english.spelled(word), phones.split(), strict=True)
    ]
    assert np.mean(errors) < 0.05


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("call 555 1234 now", "'555' can be read in several ways"),
        ("say привет to her", r"п, р, и, в, е, which is no letter of English"),
        ("... !", "its transcript has no words"),
    ],
)
def test_transcripts_whose_reading_is_uncertain_are_refused(text: str, reason: str, english: Pronunciations) -> None:
    with pytest.raises(UserError, match=reason):
        english.words(text)


@pytest.mark.parametrize(
    ("texts", "language", "reason"),
    [
        (["привет мир"], None, r"characters of another script in 1 of 1 transcript \(п, р, и"),
        (["hello world"], "de", "'de' is the language of 1 utterance; pocketsphinx"),
        (
            ["der hund läuft über die straße und sucht seinen besitzer der heute nicht nach hause gekommen ist"] * 3,
            None,
            "are in the English dictionary, and läuft",
        ),
    ],
)
def test_transcripts_in_another_language_are_refused_and_another_aligner_is_named(
    texts: list[str], language: str | None, reason: str, english: Pronunciations
) -> None:
    with pytest.raises(UserError, match=f"{reason}.*Montreal Forced Aligner"):
        check_english(texts, [language], english)
    check_english(["hello world"], [None, "en-US", "English", "eng"], english)


def test_no_transcripts_other_textgrids_and_a_missing_pocketsphinx_are_refused_before_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    silent = tmp_path / "silent"
    shutil.copytree(folder, silent, ignore=shutil.ignore_patterns("*.txt"))
    assert "2 utterances, and none has a transcript" in refused(capsys, "phones", str(silent), str(out))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no audio in it" in refused(capsys, "phones", str(empty), str(out))
    assert "no such file or folder" in refused(capsys, "phones", str(tmp_path / "missing"), str(out))
    for name, inside in (("corpus.shar", "cuts.idx"), ("archives", "cuts.000000.jsonl.gz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).touch()
        assert "a Shar corpus, whose recordings are inside" in refused(capsys, "phones", str(tmp_path / name), str(out))
    assert not out.exists()
    (empty / "b.TextGrid").write_text("of another aligner")
    assert "did not write" in refused(capsys, "phones", str(folder), str(empty))
    out.write_text("a file")
    assert "a file, not a folder" in refused(capsys, "phones", str(folder), str(out))
    manifest = tmp_path / "m.jsonl"
    cut = next(iter(read_manifest_of(folder, tmp_path)))
    write_manifest([cut], manifest)
    assert "never overwritten" in refused(
        capsys, "phones", str(manifest), str(tmp_path / "new"), "--manifest", str(manifest)
    )
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    assert "hubert-lightning[phones]" in refused(capsys, "phones", str(folder), str(tmp_path / "new"))


def read_manifest_of(folder: Path, tmp_path: Path) -> CutSet:
    from hubert_lightning.data.prepare import prepare_folder

    [path, *_] = prepare_folder(folder, tmp_path / "manifests", heldout=0)
    return read_manifest(path)


def test_textgrids_are_named_by_ids_and_keep_the_suffix_only_where_it_distinguishes() -> None:
    assert _names(["a/b.wav", "c.flac", "c.wav", "19-198-0001", "utt.1"]) == {
        "a/b.wav": "a/b", "c.flac": "c.flac", "c.wav": "c.wav", "19-198-0001": "19-198-0001", "utt.1": "utt.1",
    }  # fmt: skip
    for name in ("../x", "/x", "a/../../x"):
        with pytest.raises(UserError, match="outside of OUT"):
            _names([name])


def test_phones_of_two_sets_are_not_mixed() -> None:
    assert phone_set_of(["sil", "HH", "AH", "L", "OW"]) == "ARPAbet"
    assert phone_set_of(["sil", "HH", "AH0", "L", "OW1", "spn"]) == "ARPAbet with stress"
    assert phone_set_of(["h", "ə", "l", "oʊ"]) == "another set"
    assert phone_set_of(["sil", "S"]) is None
    check_one_phone_set({"m": {"a": ["AH", "T"], "b": ["OW"], "c": ["sil"], "d": ["T"]}}, "align again")
    sentence = r"ARPAbet in 2 utterances \(a: AH, T\) and another set in 1 utterance \(c: t, ə\); align again"
    with pytest.raises(UserError, match=sentence):
        check_one_phone_set({"m": {"a": ["AH", "T"]}, "n": {"b": ["OW"], "c": ["ə", "t"]}}, "align again")
    ipa, sampa = {"a": ["ə", "t", "s"], "b": ["ɪ", "t"]}, {"c": ["@", "t"], "d": ["I"]}
    check_one_phone_set({"m": ipa, "n": {"e": ["ə", "t"], "f": ["s"]}, "o": {}}, "align again")
    with pytest.raises(UserError, match=r"m and n: phones of different sets \(@, I are in one of them only\)"):
        check_one_phone_set({"m": ipa, "n": sampa}, "align again")


@needs_recordings
@pytest.mark.slow
def test_phones_of_librispeech_agree_with_the_shared_alignments(tmp_path: Path) -> None:
    """Words outside of the dictionary are no reason to leave an utterance out; the shared alignments lack those."""
    [manifest] = prepare_librispeech(RECORDINGS / "librispeech" / "LibriSpeech", tmp_path, ["test-other"])
    cuts = {cut.id: cut for cut in read_manifest(manifest)}
    chosen = ["1688-142285-0002", "1688-142285-0005", "1998-15444-0007", "2033-164914-0004", "2033-164914-0005"]
    write_manifest([cuts[name] for name in chosen], tmp_path / "some.jsonl.gz")
    aligned = tmp_path / "aligned.jsonl.gz"
    assert run_verb("phones", tmp_path / "some.jsonl.gz", tmp_path / "textgrids", "--manifest", aligned) == 0
    ours = {cut.id: cut for cut in read_manifest(aligned)}
    assert all(phones_of(cut) for cut in ours.values())
    shared = RECORDINGS / "alignments" / "librispeech" / "test-other"
    assert run_verb("prepare", "alignments", tmp_path / "some.jsonl.gz", shared, tmp_path / "shared.jsonl.gz") == 0
    same, total = 0, 0
    for cut in read_manifest(tmp_path / "shared.jsonl.gz"):
        if phones_of(cut):
            frames = num_frames(cut.num_samples)
            pair = [frame_phones(phones_of(one), frames) for one in (cut, ours[cut.id])]
            same += sum(first == second for first, second in zip(*pair, strict=True))
            total += frames
    assert total > 300
    assert same / total > 0.97
