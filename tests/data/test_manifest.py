"""From audio on disk to manifests, and back."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, RecordingSet
from lhotse.audio import AudioSource

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import check_audio, fingerprint, read_manifest, read_manifests, write_manifest
from hubert_lightning.data.prepare import prepare_folder, prepare_librilight, prepare_librispeech
from hubert_lightning.frames import SAMPLE_RATE, WINDOW

RECORDINGS = Path(__file__).parents[3] / "shared" / "data"
needs_recordings = pytest.mark.skipif(
    not RECORDINGS.is_dir(), reason="the real recordings are not beside this checkout (../shared/data)"
)


def speak(path: Path, seconds: float = 0.5, rate: int = SAMPLE_RATE, num_channels: int = 1, **kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(0, 0.1, (round(seconds * rate), num_channels))
    soundfile.write(path, noise, rate, **kind)
    return path


def librispeech(folder: Path, **speakers: int) -> Path:
    """<folder>/<speaker>/7/<speaker>-7-000k.flac, so many for each speaker, with transcripts."""
    for speaker, count in speakers.items():
        number = speaker.lstrip("s")
        lines = []
        for k in range(count):
            speak(folder / number / "7" / f"{number}-7-{k:04d}.flac", seconds=0.3 + 0.1 * k)
            lines.append(f"{number}-7-{k:04d} HELLO NUMBER {'I' * (k + 1)}\n")
        (folder / number / "7" / f"{number}-7.trans.txt").write_text("".join(lines))
    return folder


def made_up_cut(name: str, start: int, size: int, path: str = "/corpus/a.flac") -> MonoCut:
    source = AudioSource("file", [0], path)
    recording = Recording(name, [source], SAMPLE_RATE, start + size, (start + size) / SAMPLE_RATE)
    return MonoCut(name, start / SAMPLE_RATE, size / SAMPLE_RATE, 0, recording=recording)


def refusals(path: Path) -> dict[str, str]:
    return {Path(line.split("\t")[0]).name: line.split("\t")[1] for line in path.read_text().splitlines()}


def test_librispeech_gives_a_manifest_for_each_subset_with_transcripts_and_speakers(tmp_path: Path) -> None:
    librispeech(tmp_path / "LibriSpeech" / "train-clean-100", s19=3, s26=2)
    librispeech(tmp_path / "LibriSpeech" / "dev-clean", s84=1)
    for transcript in (tmp_path / "LibriSpeech" / "dev-clean").rglob("*.txt"):
        transcript.unlink()
    for corpus in (tmp_path, tmp_path / "LibriSpeech"):
        paths = prepare_librispeech(corpus, tmp_path / "out")
        assert sorted(path.name for path in paths) == ["dev-clean.jsonl.gz", "train-clean-100.jsonl.gz"]
    train = read_manifest(tmp_path / "out" / "train-clean-100.jsonl.gz")
    assert [cut.id for cut in train] == ["19-7-0000", "19-7-0001", "19-7-0002", "26-7-0000", "26-7-0001"]
    assert [cut.supervisions[0].text for cut in train][:2] == ["HELLO NUMBER I", "HELLO NUMBER II"]
    assert {cut.supervisions[0].speaker for cut in train} == {"19", "26"}
    assert [cut.num_samples for cut in train][:2] == [4800, 6400]
    assert all(Path(cut.recording.sources[0].source).is_absolute() for cut in train)
    [dev] = read_manifest(tmp_path / "out" / "dev-clean.jsonl.gz")
    assert dev.supervisions[0].text is None
    assert dev.supervisions[0].speaker == "84"


def test_a_missing_subset_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    librispeech(tmp_path / "dev-clean", s84=1)
    prepare_librispeech(tmp_path, tmp_path / "out", ["dev-clean"])
    with pytest.raises(ValueError, match=r"no test-clean with audio in it, only dev-clean"):
        prepare_librispeech(tmp_path, tmp_path / "out", ["dev-clean", "test-clean"])
    with pytest.raises(ValueError, match="no subset such as"):
        prepare_librispeech(tmp_path / "dev-clean", tmp_path / "out")
    with pytest.raises(ValueError, match="no such folder"):
        prepare_librispeech(tmp_path / "nowhere", tmp_path / "out")


def test_librilight_nests_ten_minutes_in_one_hour_in_ten_hours(tmp_path: Path) -> None:
    root = tmp_path / "librispeech_finetuning"
    librispeech(root / "1h" / "0" / "clean", s1=1)
    librispeech(root / "1h" / "0" / "other", s2=1)
    out = tmp_path / "out"
    assert {path.name for path in prepare_librilight(tmp_path, out)} == {"10min.jsonl.gz", "1h.jsonl.gz"}
    librispeech(root / "1h" / "5" / "other", s3=2)
    librispeech(root / "9h" / "clean", s4=3)
    with pytest.raises(ValueError, match="lists other audio; remove it"):
        prepare_librilight(root, out)
    (out / "1h.jsonl.gz").unlink()
    prepare_librilight(root, out)
    speakers = {
        name: [cut.supervisions[0].speaker for cut in read_manifest(out / f"{name}.jsonl.gz")]
        for name in ("10min", "1h", "10h")
    }
    assert speakers == {"10min": ["1", "2"], "1h": ["1", "2", "3", "3"], "10h": ["1", "2", "3", "3", "4", "4", "4"]}


def test_a_folder_of_every_kind_of_audio_is_read_at_16_khz(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    kinds = {"wav": {}, "flac": {}, "ogg": {}, "mp3": {}, "aiff": {}, "opus": {"format": "OGG", "subtype": "OPUS"}}
    for suffix, kind in kinds.items():
        for rate in (8_000, 16_000, 44_100, 48_000) if suffix != "opus" else (8_000, 16_000, 48_000):
            for num_channels in (1, 2):
                speak(root / "ann" / f"{rate}x{num_channels}.{suffix}", 0.5, rate, num_channels, **kind)
    speak(root / "UPPER.WAV")
    (root / "ann" / "._8000x1.wav").write_bytes(b"what macOS leaves")
    prepare_folder(root, tmp_path / "out", heldout=0)
    cuts = read_manifest(tmp_path / "out" / "mixed.jsonl.gz")
    assert {cut.id for cut in cuts} == {
        path.relative_to(root).as_posix() for path in root.rglob("*.*") if not path.name.startswith("._")
    }
    for cut in cuts:
        assert cut.sampling_rate == SAMPLE_RATE
        # FFmpeg ends short Ogg Vorbis up to a block off
        assert abs(cut.num_samples - 8000) <= (320 if cut.id.endswith("ogg") else 1)
        assert read_waveform(cut).shape == (cut.num_samples,)
        assert [supervision.speaker for supervision in cut.supervisions] == (["ann"] if "/" in cut.id else [])
    assert not (tmp_path / "out" / "mixed.refused.tsv").exists()


def test_transcripts_lie_beside_the_audio_or_in_a_list_of_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "talk"
    for name in ("a.wav", "b.flac", "c.wav", "sub/d.wav"):
        speak(root / name)
    (root / "a.txt").write_text("good  morning\nall\n")
    (root / "talk.trans.txt").write_text("b SECOND ONE\nelsewhere NOT HERE\n")
    (root / "sub" / "d.txt").write_text("\ufeffnaïve", "utf-8")
    prepare_folder(root, tmp_path / "out", heldout=0)
    texts = {
        cut.id: [supervision.text for supervision in cut.supervisions]
        for cut in read_manifest(tmp_path / "out" / "talk.jsonl.gz")
    }
    assert texts == {"a.wav": ["good morning all"], "b.flac": ["SECOND ONE"], "c.wav": [], "sub/d.wav": ["naïve"]}
    (root / "a.txt").write_bytes("café".encode("latin-1"))
    (root / "sub" / "sub.trans.txt").write_bytes("e café".encode("latin-1"))
    speak(root / "sub" / "e.wav")
    prepare_folder(root, tmp_path / "again", heldout=0)
    assert set(read_manifest(tmp_path / "again" / "talk.jsonl.gz").ids) == {"b.flac", "c.wav", "sub/d.wav"}
    reasons = (tmp_path / "again" / "talk.refused.tsv").read_text().splitlines()
    assert [reason.split("\t")[1].split(" is not UTF-8")[0] for reason in reasons] == [
        "its transcript, a.txt,",
        "its transcript is in sub.trans.txt, which",
    ]


def test_a_link_to_a_folder_around_it_is_not_followed_for_ever(tmp_path: Path) -> None:
    speak(tmp_path / "talk" / "sub" / "a.wav")
    (tmp_path / "talk" / "sub" / "loop").symlink_to(tmp_path / "talk", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    speak(tmp_path / "elsewhere" / "b.wav")
    (tmp_path / "talk" / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    prepare_folder(tmp_path / "talk", tmp_path / "out", heldout=0)
    assert set(read_manifest(tmp_path / "out" / "talk.jsonl.gz").ids) == {"linked/b.wav", "sub/a.wav"}


@given(
    num_samples=st.integers(3 * WINDOW, 200_000), max_duration=st.floats(0.1, 5.0), rate=st.sampled_from([8000, 44_100])
)
@settings(max_examples=25, deadline=None)
def test_pieces_of_a_long_recording_are_equal_and_cover_it(
    tmp_path_factory: pytest.TempPathFactory, num_samples: int, max_duration: float, rate: int
) -> None:
    folder = tmp_path_factory.mktemp("long")
    path = folder / "in" / "long.wav"
    path.parent.mkdir()
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, num_samples), rate)
    (folder / "in" / "long.txt").write_text("hello")
    prepare_folder(folder / "in", folder / "out", max_duration, heldout=0)
    pieces = list(read_manifest(folder / "out" / "in.jsonl.gz"))
    sizes = [piece.num_samples for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= WINDOW
    assert max(sizes) <= round(max_duration * SAMPLE_RATE)
    assert sum(sizes) == pieces[0].recording.num_samples
    starts = [round(piece.start * SAMPLE_RATE) for piece in pieces]
    assert starts == [sum(sizes[:k]) for k in range(len(sizes))]
    if len(pieces) > 1:
        assert [piece.id for piece in pieces[:2]] == ["long.wav-000", "long.wav-001"]
        assert not any(piece.supervisions for piece in pieces)
    else:
        assert [supervision.text for supervision in pieces[0].supervisions] == ["hello"]
    assert len(read_waveform(pieces[-1])) == sizes[-1]


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])


def test_unusable_files_are_refused_with_the_reason_and_the_others_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "wild"
    speak(root / "good.wav")
    for suffix in ("wav", "flac", "mp3"):
        cut_short(speak(root / f"short{suffix}.{suffix}"))
    (root / "nothing.wav").write_bytes(b"")
    (root / "text.flac").write_text("not audio")
    speak(root / "no_samples.wav", seconds=0)
    speak(root / "click.wav", seconds=(WINDOW - 1) / SAMPLE_RATE)
    speak(root / "one_frame.wav", seconds=WINDOW / SAMPLE_RATE)
    speak(root / "slow.wav", rate=2000)
    speak(root / "odd.wav", rate=44_099)
    soundfile.write(root / "nan.wav", np.full(8000, np.nan), SAMPLE_RATE, subtype="FLOAT")
    prepare_folder(root, tmp_path / "out", heldout=0)
    assert {cut.id for cut in read_manifest(tmp_path / "out" / "wild.jsonl.gz")} == {"good.wav", "one_frame.wav"}
    reasons = refusals(tmp_path / "out" / "wild.refused.tsv")
    expected = {
        "shortwav.wav": "truncated",
        "shortflac.flac": "truncated",
        "shortmp3.mp3": "truncated",
        "nothing.wav": "empty: it has no bytes",
        "text.flac": "unreadable",
        "no_samples.wav": "empty",
        "click.wav": "too short: 399 samples",
        "slow.wav": "sampled at 2000 Hz",
        "odd.wav": "sampled at 44099 Hz",
        "nan.wav": "corrupt",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reasons[name].startswith(reason), (name, reasons[name])
    said = capsys.readouterr().out
    assert "10 audio files refused" in said
    assert "click.wav: too short" in said.replace("\n", "")


def test_of_two_files_with_one_id_the_second_is_refused(tmp_path: Path) -> None:
    librispeech(tmp_path / "1h" / "0" / "clean", s1=1)
    librispeech(tmp_path / "1h" / "1" / "other", s1=2)
    prepare_librilight(tmp_path, tmp_path / "out")
    assert len(read_manifest(tmp_path / "out" / "1h.jsonl.gz")) == 2
    assert "repeated: has the same id as" in refusals(tmp_path / "out" / "1h.refused.tsv")["1-7-0000.flac"]


def test_a_corpus_without_usable_audio_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    with pytest.raises(
        ValueError, match=r"no audio in it; give a folder with \.wav, \.flac, \.mp3 or another of \d+ suf"
    ):
        prepare_folder(root, tmp_path / "out", heldout=0)
    (root / "a.wav").write_text("nonsense")
    with pytest.raises(ValueError, match=r"all 1 audio files are refused, .*a\.wav: unreadable"):
        prepare_folder(root, tmp_path / "out", heldout=0)
    assert "a.wav" in refusals(tmp_path / "out" / "in.refused.tsv")
    with pytest.raises(ValueError, match="max_duration"):
        prepare_folder(root, tmp_path / "out", max_duration=0.01, heldout=0)


def test_a_manifest_is_only_replaced_by_one_of_the_same_audio(tmp_path: Path) -> None:
    root = tmp_path / "in"
    speak(root / "a.wav")
    [path] = prepare_folder(root, tmp_path / "out", heldout=0)
    (root / "a.txt").write_text("now transcribed")
    prepare_folder(root, tmp_path / "out", heldout=0)
    assert read_manifest(path)[0].supervisions[0].text == "now transcribed"
    before = path.read_bytes()
    speak(root / "b.wav")
    with pytest.raises(ValueError, match="lists other audio; remove it, or choose another folder"):
        prepare_folder(root, tmp_path / "out", heldout=0)
    assert path.read_bytes() == before


@given(st.lists(st.tuples(st.integers(0, 10**8), st.integers(1, 10**6)), min_size=1, max_size=8), st.randoms())
@settings(max_examples=50, deadline=None)
def test_the_fingerprint_survives_the_disk_the_order_and_a_move_but_no_change_of_audio(
    tmp_path_factory: pytest.TempPathFactory, places: list[tuple[int, int]], random: Random
) -> None:
    cuts = [made_up_cut(f"u{k}", start, size) for k, (start, size) in enumerate(places)]
    print_before = fingerprint(cuts)
    path = tmp_path_factory.mktemp("m") / "m.jsonl.gz"
    write_manifest(cuts, path)
    read = list(read_manifest(path))
    assert [(cut.id, cut.num_samples) for cut in read] == [(f"u{k}", size) for k, (_, size) in enumerate(places)]
    random.shuffle(read)
    assert fingerprint(read) == print_before
    moved = [made_up_cut(f"u{k}", *place, path="/elsewhere/b.flac") for k, place in enumerate(places)]
    assert fingerprint(moved) == print_before
    start, size = places[-1]
    for changed in ((start + 1, size), (start, size + 1)):
        assert fingerprint([*cuts[:-1], made_up_cut(cuts[-1].id, *changed)]) != print_before
    assert fingerprint([*cuts[:-1], made_up_cut("other", start, size)]) != print_before
    assert fingerprint([*cuts, made_up_cut("one more", 0, 1)]) != print_before


def test_an_error_names_a_file_that_is_no_manifest_and_the_verb_that_makes_one(tmp_path: Path) -> None:
    good, recordings, empty = tmp_path / "good.jsonl.gz", tmp_path / "recordings.jsonl.gz", tmp_path / "empty.jsonl"
    cut = made_up_cut("a", 0, 5000)
    write_manifest([cut], good)
    RecordingSet.from_recordings([cut.recording]).to_file(recordings)
    empty.write_text("")
    text = tmp_path / "text.jsonl"
    text.write_text("hello\n")
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(good.read_bytes()[:-20])
    for path, fact in [
        (tmp_path / "none.jsonl.gz", "no such manifest"),
        (recordings, "holds a Recording"),
        (empty, "an empty manifest"),
        (text, "not a cut manifest"),
        (broken, "not a cut manifest"),
    ]:
        with pytest.raises(ValueError, match=fact) as error:
            read_manifest([good, path])
        assert str(path) in str(error.value)
        assert "hubert prepare" in str(error.value)
    with pytest.raises(ValueError, match=r"^a: in .*good.jsonl.gz and again in .*good.jsonl.gz"):
        read_manifest([good, good])
    with pytest.raises(ValueError, match="no manifest is named"):
        read_manifest([])
    assert [cut.id for cut in read_manifest(good)] == ["a"]


def test_missing_audio_is_refused_before_training(tmp_path: Path) -> None:
    for name in ("a.wav", "b.wav", "c.wav"):
        speak(tmp_path / "in" / name)
    [path] = prepare_folder(tmp_path / "in", tmp_path / "out", heldout=0)
    cuts = read_manifest(path)
    check_audio(cuts)
    (tmp_path / "in" / "b.wav").unlink()
    (tmp_path / "in" / "c.wav").unlink()
    with pytest.raises(ValueError, match=r"^b\.wav: .*b\.wav is not there; mount or restore it"):
        check_audio(cuts)
    whole = (tmp_path / "in" / "a.wav").read_bytes()
    for rest in (whole[:-100], b""):
        (tmp_path / "in" / "a.wav").write_bytes(rest)
        sentence = rf"^a\.wav: .*a\.wav has {len(rest)} bytes, {len(whole)} when it was prepared; restore it"
        with pytest.raises(ValueError, match=sentence):
            check_audio(cuts)
    other = replace(cuts[0].recording, sampling_rate=8000).to_cut()
    with pytest.raises(ValueError, match="8000 Hz"):
        check_audio(CutSet([other]))


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl.gz"
    write_manifest([made_up_cut("a", 0, 5000)], path)

    def interrupted() -> Iterator[MonoCut]:
        yield made_up_cut("b", 0, 5000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(interrupted(), path)
    assert [cut.id for cut in read_manifest(path)] == ["a"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@needs_recordings
def test_real_librispeech_is_prepared_whole(tmp_path: Path) -> None:
    prepare_librispeech(RECORDINGS / "librispeech", tmp_path)
    train = read_manifest(tmp_path / "train-clean-100.jsonl.gz")
    assert len(train) == 252
    assert len({cut.supervisions[0].speaker for cut in train}) == 251
    assert not any(cut.supervisions[0].text for cut in train)
    test = read_manifest(tmp_path / "test-other.jsonl.gz")
    assert len(test) == 30
    assert all(cut.supervisions[0].text.isupper() for cut in test)
    prepare_librilight(RECORDINGS / "digits", tmp_path)
    assert fingerprint(read_manifest(tmp_path / "10min.jsonl.gz")) == fingerprint(
        read_manifest(tmp_path / "1h.jsonl.gz")
    )
    assert all(len(read_waveform(cut)) == cut.num_samples for cut in read_manifest(tmp_path / "10min.jsonl.gz"))


def test_a_manifest_is_read_without_garbage_collection(train_cuts: CutSet, tmp_path: Path) -> None:
    """Which would take as long again, since every line makes a dozen objects that all stay."""
    write_manifest([train_cuts[0].with_id(str(number)) for number in range(500)], tmp_path / "many.jsonl")
    collections = 0

    def count(phase: str, info: dict[str, int]) -> None:
        nonlocal collections
        collections += phase == "start"

    gc.callbacks.append(count)
    try:
        assert len(read_manifests([tmp_path / "many.jsonl"])[0]) == 500
        assert collections <= 1  # once all are there
        assert gc.isenabled()
    finally:
        gc.callbacks.remove(count)
