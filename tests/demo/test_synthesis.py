"""The synthetic corpus: what it says, where it says it, and that it says it again."""

import hashlib
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.data.alignments import SILENCE
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import fingerprint, read_manifest
from hubert_lightning.data.prepare import prepare_librispeech
from hubert_lightning.demo.espeak import Espeak, Voice
from hubert_lightning.demo.grammar import librispeech_transcript, sentences
from hubert_lightning.demo.synthesis import GRID, _word_times, synthesise_corpus

SMALL: dict[str, Any] = {
    "train_minutes": 1.5,
    "finetuning_minutes": 0.5,
    "dev_minutes": 0.4,
    "test_minutes": 0.4,
    "train_speakers": 12,
}
VOWELS = {"a", "E", "i", "I", "V", "0", "O", "u", "eI", "aI", "oU", "aU", "3", "@", "A@", "e@"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthesis")
    synthesise_corpus(folder, **SMALL)
    return folder


@pytest.fixture(scope="module")
def sets(corpus: Path) -> dict[str, CutSet]:
    return {name: read_manifest(corpus / f"manifests/{name}.jsonl.gz") for name in ("train", "finetune", "dev", "test")}


def test_sentences_are_distinct_words_of_a_small_vocabulary_and_the_same_for_a_seed() -> None:
    said = list(itertools.islice(sentences(seed=3), 2000))
    assert said == list(itertools.islice(sentences(seed=3), 2000))
    assert said != list(itertools.islice(sentences(seed=4), 2000))
    assert len(set(said)) == 2000
    words = {word for text in said for word in librispeech_transcript(text).split()}
    assert 95 < len(words) < 110
    assert all(re.fullmatch(r"[A-Z]+('[A-Z]+)?", word) for word in words)
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in said)


def test_words_that_espeak_joins_are_divided_between_their_phones() -> None:
    text = "there was a bell on the door of the house, so many of a kind from the north that it had been in the way"
    voice = Voice("en-us+m3", rate=165, pitch=50, pitch_range=50, level=-25, noise=40)
    with Espeak() as espeak:
        _, phones = espeak.say(text, voice)
    first = [
        (word, next(phone.symbol for phone in phones if phone.start == start))
        for word, start, _ in _word_times(text, phones)
    ]
    assert [word for word, _ in first] == librispeech_transcript(text).split()
    beginnings = {"THE": {"D"}, "A": {"@"}, "WAS": {"w"}, "BEEN": {"b"}, "MANY": {"m"}, "IT": {"I"}, "HAD": {"h"}}
    for word, phone in first:
        assert phone in beginnings.get(word, {phone}), (word, phone)


def test_each_set_lasts_as_long_as_asked_and_utterances_are_of_ordinary_length(sets: dict[str, CutSet]) -> None:
    for name, minutes in {"train": 1.5, "finetune": 0.5, "dev": 0.4, "test": 0.4}.items():
        durations = [cut.duration for cut in sets[name]]
        assert minutes * 60 <= sum(durations) <= minutes * 60 + 9
        assert 2 < min(durations) < max(durations) < 9
        assert all(duration % GRID == 0 for duration in durations)
    assert {cut.id for cut in sets["finetune"]} < {cut.id for cut in sets["train"]}


def test_no_speaker_voice_or_sentence_is_in_two_sets(sets: dict[str, CutSet]) -> None:
    for one, other in itertools.combinations(["train", "dev", "test"], 2):
        for trait in (
            lambda cut: cut.supervisions[0].speaker,
            lambda cut: cut.supervisions[0].custom["voice"].split("+")[1],
            lambda cut: cut.supervisions[0].text,
        ):
            assert not {trait(cut) for cut in sets[one]} & {trait(cut) for cut in sets[other]}
    assert len({cut.supervisions[0].custom["voice"] for cut in sets["train"]}) == 12


def test_phones_fill_the_utterance_without_gap_and_words_lie_on_them(sets: dict[str, CutSet]) -> None:
    symbols = set()
    for cut in itertools.chain(*(sets[name] for name in ("train", "dev", "test"))):
        [supervision] = cut.supervisions
        phones, words = supervision.alignment["phone"], supervision.alignment["word"]
        assert phones[0].start == 0
        assert phones[-1].end == pytest.approx(cut.duration, abs=1e-6)
        for before, after in itertools.pairwise(phones):
            assert after.start == pytest.approx(before.end, abs=1e-6)
        assert all(phone.duration > 0 for phone in phones)
        assert phones[0].symbol == phones[-1].symbol == SILENCE

        assert " ".join(word.symbol for word in words) == supervision.text
        assert all(word.duration > 0.01 for word in words)
        assert all(before.end <= after.start + 1e-6 for before, after in itertools.pairwise(words))
        starts = [phone.start for phone in phones]
        assert all(min(abs(word.start - start) for start in starts) < 1e-6 for word in words)
        silent = sum(phone.duration for phone in phones if phone.symbol == SILENCE)
        assert silent + sum(word.duration for word in words) == pytest.approx(cut.duration, abs=1e-3)
        symbols |= {phone.symbol for phone in phones}
    assert 35 < len(symbols) < 60


def spans(cut: Cut) -> list[tuple[str, Tensor]]:
    """Phones of 30 ms or more, with their audio."""
    waveform = read_waveform(cut)
    return [
        (phone.symbol, waveform[round(phone.start * 16000) : round(phone.end * 16000)])
        for phone in cut.supervisions[0].alignment["phone"]
        if phone.duration >= 0.03
    ]


def decibels(sounds: list[tuple[str, Tensor]], symbols: set[str]) -> Tensor:
    return torch.stack([20 * sound.square().mean().sqrt().log10() for name, sound in sounds if name in symbols])


def test_the_audio_agrees_with_its_alignment(sets: dict[str, CutSet]) -> None:
    by_cut = [spans(cut) for cut in sets["dev"]]
    for sounds in by_cut:  # each speaker has a level and a noise, at least 5 dB below the speech
        assert decibels(sounds, {SILENCE}).median() < decibels(sounds, VOWELS).median() - 5
    sounds = list(itertools.chain(*by_cut))

    def crossings(symbols: set[str]) -> Tensor:
        return torch.stack([(s[1:] * s[:-1] < 0).float().mean() for name, s in sounds if name in symbols])

    hissing = crossings({"s", "z", "S", "tS"})
    assert hissing.median() > 2 * crossings(VOWELS).median()  # faint or not, noise of the room crosses zero too


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
        if path.suffix in (".flac", ".txt")
    }


def test_the_same_seed_makes_the_same_files_again_and_another_seed_others(corpus: Path, tmp_path: Path) -> None:
    synthesise_corpus(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(corpus)
    tiny: dict[str, Any] = {"train_minutes": 0.1, "finetuning_minutes": 0.1, "dev_minutes": 0.1, "test_minutes": 0.1}
    synthesise_corpus(tmp_path / "other", **tiny, seed=1)
    assert not set(contents(tmp_path / "other").values()) & set(contents(corpus).values())


def test_a_complete_corpus_is_left_alone_and_anything_else_is_refused(corpus: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert synthesise_corpus(corpus, **SMALL) == corpus / "manifests"
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before
    with pytest.raises(ValueError, match="remove it, or choose another folder"):
        synthesise_corpus(corpus, **SMALL, seed=5)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="choose an empty folder"):
        synthesise_corpus(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(ValueError, match="fine-tuning"):
        synthesise_corpus(tmp_path / "new", train_minutes=1, finetuning_minutes=2)


def test_an_interrupted_corpus_is_finished(corpus: Path, tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"train_minutes": 0.2, "finetuning_minutes": 0.1, "dev_minutes": 0.1, "test_minutes": 0.1}
    synthesise_corpus(tmp_path / "whole", **tiny)
    marker = tmp_path / "whole" / "corpus.json"
    marker.write_text(marker.read_text().replace('"complete": true', '"complete": false'))
    wanted = contents(tmp_path / "whole")
    next((tmp_path / "whole").rglob("*.flac")).unlink()
    synthesise_corpus(tmp_path / "whole", **tiny)
    assert contents(tmp_path / "whole") == wanted


def test_a_moved_corpus_has_manifests_that_find_it(tmp_path: Path) -> None:
    tiny: dict[str, Any] = {"train_minutes": 0.1, "finetuning_minutes": 0.1, "dev_minutes": 0.1, "test_minutes": 0.1}
    synthesise_corpus(tmp_path / "here", **tiny)
    before = fingerprint(read_manifest(tmp_path / "here/manifests/train.jsonl.gz"))
    (tmp_path / "here").rename(tmp_path / "there")
    synthesise_corpus(tmp_path / "there", **tiny)
    cuts = read_manifest(tmp_path / "there/manifests/train.jsonl.gz")
    assert fingerprint(cuts) == before
    assert all(len(read_waveform(cut)) == cut.num_samples for cut in cuts)


def test_the_corpus_has_the_folders_of_librispeech(corpus: Path, sets: dict[str, CutSet], tmp_path: Path) -> None:
    prepare_librispeech(corpus, tmp_path)
    for name, subset in {"train": "train-clean-100", "dev": "dev-clean", "test": "test-clean"}.items():
        found = read_manifest(tmp_path / f"{subset}.jsonl.gz")
        assert fingerprint(found) == fingerprint(sets[name])
        texts = {cut.id: (cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in found}
        assert texts == {cut.id: (cut.supervisions[0].text, cut.supervisions[0].speaker) for cut in sets[name]}
