"""From the aligner's TextGrids to the phones of frames."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers import HELLO, HELLO_WORD, Interval, long_format, short_format
from hypothesis import given
from hypothesis import strategies as st
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.cut import Cut
from lhotse.supervision import AlignmentItem

from hubert_lightning.cli import main
from hubert_lightning.data.alignments import SILENCE, check_alignment, destination, phones_of, prepare_alignments
from hubert_lightning.data.manifest import fingerprint, read_manifest, write_manifest
from hubert_lightning.data.prepare import prepare_folder
from hubert_lightning.frames import SAMPLE_RATE, frame_centres, num_frames
from hubert_lightning.units.quality import frame_phones

Writer = Callable[[dict[str, list[Interval]], float], str]


def write(path: Path, content: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding)
    return path


def textgrid(path: Path, phones: list[Interval] = HELLO, words: list[Interval] | None = None) -> Path:
    tiers = ({"words": words} if words else {}) | {"phones": phones}
    return write(path, long_format(tiers, phones[-1][1]))


def utterance(name: str, seconds: float = 1.2) -> MonoCut:
    recording = Recording(
        name, [AudioSource("file", [0], f"/corpus/{name}.flac")], SAMPLE_RATE, round(seconds * SAMPLE_RATE), seconds
    )
    return recording.to_cut()


def pieces(name: str, count: int) -> list[MonoCut]:
    """A recording cut each second."""
    recording = utterance(name, float(count)).recording
    return [MonoCut(f"{name}-{k:03d}", float(k), 1.0, 0, recording=recording) for k in range(count)]


def aligned(folder: Path, *cuts: Cut, textgrids: Path | None = None, drop_stress: bool = True) -> CutSet:
    """The cuts with the phones of the TextGrids in `<folder>/textgrids`."""
    write_manifest(cuts, folder / "in" / "m.jsonl.gz")
    path = prepare_alignments(
        folder / "in" / "m.jsonl.gz", textgrids or folder / "textgrids", folder / "out", drop_stress
    )
    return read_manifest(path)


def symbols(cut: Cut) -> list[str]:
    return [symbol for _, _, symbol in phones_of(cut)]


def spoken_at(intervals: Sequence[Interval], second: float) -> str:
    return next((label or "sil" for start, end, label in intervals if start <= second < end), "")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-with-bom"])
@pytest.mark.parametrize("layout", [long_format, short_format])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_phones_are_read_in_every_format_and_encoding_of_praat(
    tmp_path: Path, layout: Writer, encoding: str, line_end: str
) -> None:
    phones = [(0.0, 0.5, "ɹ"), (0.5, 0.7, "tʃʰ"), (0.7, 1.2, "")]
    content = layout({"words": [(0.0, 0.7, "wretch"), (0.7, 1.2, "")], "phones": phones}, 1.2)
    path = tmp_path / "textgrids" / "19" / "198" / "19-198-0000.TextGrid"
    path.parent.mkdir(parents=True)
    mark, codec = ("\ufeff", "utf-16-le") if encoding == "utf-16-le-with-bom" else ("", encoding)
    path.write_bytes((mark + content.replace("\n", line_end)).encode(codec))
    [cut] = aligned(tmp_path, utterance("19-198-0000"))
    assert phones_of(cut) == [(0.0, 0.5, "ɹ"), (0.5, 0.2, "tʃʰ"), (0.7, 0.5, "sil")]
    assert cut.supervisions[0].alignment["word"] == [AlignmentItem("wretch", 0.0, 0.7)]


@given(
    durations=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    labels=st.lists(st.sampled_from(["", "AH0", "T", "spn"]), min_size=40, max_size=40),
    piece=st.tuples(st.integers(0, 16_000), st.integers(400, 30_000)),
)
def test_every_frame_has_the_phone_that_the_textgrid_has_at_its_centre_also_in_a_piece_of_a_recording(
    tmp_path_factory: pytest.TempPathFactory, durations: list[int], labels: list[str], piece: tuple[int, int]
) -> None:
    """durations: of the phones, milliseconds; piece: first sample and number of samples"""
    bounds = [bound / 1000 for bound in accumulate(durations, initial=0)]
    phones = [(start, end, label) for (start, end), label in zip(pairwise(bounds), labels)]
    folder = tmp_path_factory.mktemp("alignment")
    textgrid(folder / "textgrids" / "talk.TextGrid", phones)
    first, size = piece
    whole = utterance("talk", max((first + size) / SAMPLE_RATE, bounds[-1]))
    part = MonoCut("talk-001", first / SAMPLE_RATE, size / SAMPLE_RATE, 0, recording=whole.recording)
    for cut, start in zip(aligned(folder, whole, part, drop_stress=False), (0.0, first / SAMPLE_RATE)):
        check_alignment(cut)
        frames = num_frames(cut.num_samples)
        centres = [round(start + centre, 9) for centre in frame_centres(frames).tolist()]
        assert frame_phones(phones_of(cut), frames) == [spoken_at(phones, centre) for centre in centres]


def test_a_piece_takes_its_own_textgrid_before_its_recordings_whose_start_is_another(tmp_path: Path) -> None:
    textgrid(tmp_path / "textgrids" / "talk.TextGrid", [(0.0, 0.5, "AA"), (0.5, 1.5, "B"), (1.5, 3.0, "D")])
    textgrid(tmp_path / "textgrids" / "talk-002.TextGrid", [(0.0, 0.5, "IY"), (0.5, 1.0, "K")])
    first, second, own = aligned(tmp_path, *pieces("talk", 3))
    assert phones_of(first) == [(0.0, 0.5, "AA"), (0.5, 0.5, "B")]
    assert phones_of(second) == [(0.0, 0.5, "B"), (0.5, 0.5, "D")]
    assert phones_of(own) == [(0.0, 0.5, "IY"), (0.5, 0.5, "K")]


def test_silences_are_one_symbol_and_spoken_noise_another(tmp_path: Path) -> None:
    labels = ["", "sil", "sp", "spn", "S", "AH0", "OW1", "IH2", "a5", "NG"]
    phones = [(k / 10, (k + 1) / 10, label) for k, label in enumerate(labels)]
    textgrid(tmp_path / "textgrids" / "a.TextGrid", phones)
    [plain] = aligned(tmp_path, utterance("a", 1.0))
    assert symbols(plain) == ["sil", "sil", "sil", "spn", "S", "AH", "OW", "IH", "a5", "NG"]
    [stressed] = aligned(tmp_path, utterance("a", 1.0), drop_stress=False)
    assert symbols(stressed) == ["sil", "sil", "sil", "spn", "S", "AH0", "OW1", "IH2", "a5", "NG"]


def test_manifests_with_other_labels_of_silence_have_the_same_symbol() -> None:
    cut = utterance("a")
    for label in ("SIL", "sil", "sp", ""):
        alignment = {"phone": [AlignmentItem(label, 0.0, 0.5), AlignmentItem("S", 0.5, 0.5)]}
        cut.supervisions = [SupervisionSegment("a", "a", 0.0, 1.0, alignment=alignment)]
        assert symbols(cut) == [SILENCE, "S"]


def test_of_several_speakers_in_a_file_the_one_of_the_manifest_counts(tmp_path: Path) -> None:
    one, other = [(0.0, 1.0, "AA"), (1.0, 1.2, "")], [(0.0, 1.0, ""), (1.0, 1.2, "B")]
    cut = utterance("a")
    write(tmp_path / "textgrids" / "a.TextGrid", short_format({"19 - words": one, "19 - phones": one}, 1.2))
    assert symbols(*aligned(tmp_path, cut)) == ["AA", "sil"]
    write(tmp_path / "textgrids" / "a.TextGrid", short_format({"19 - phones": one, "26 - phones": other}, 1.2))
    with pytest.raises(ValueError, match=r"a\.TextGrid: has the tiers 19 - phones, 26 - phones, and none of them is"):
        aligned(tmp_path, cut)
    cut.supervisions = [SupervisionSegment("a", "a", 0.0, 1.2, speaker="26")]
    assert symbols(*aligned(tmp_path, cut)) == ["sil", "B"]


def test_nothing_but_the_alignment_changes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, bare, alone = utterance("text"), utterance("bare"), utterance("alone", 3.0)
    text.supervisions = [SupervisionSegment("text", "text", 0.0, 1.2, text="HELLO", speaker="19")]
    bare.custom = {"bytes": 1234}
    textgrid(tmp_path / "textgrids" / "text.TextGrid", words=HELLO_WORD)
    textgrid(tmp_path / "textgrids" / "deep" / "er" / "bare.TextGrid")
    cuts = aligned(tmp_path, text, bare, alone)
    assert [cut.id for cut in cuts] == ["text", "bare", "alone"]
    assert fingerprint(cuts) == fingerprint([text, bare, alone])
    spoken = cuts[0].supervisions[0]
    assert (spoken.text, spoken.speaker, spoken.alignment["word"][0].symbol) == ("HELLO", "19", "hello")
    assert symbols(cuts[0]) == symbols(cuts[1]) == ["sil", "HH", "AH", "L", "OW", "sil"]
    assert (cuts[1].custom["bytes"], cuts[1].supervisions[0].duration) == (1234, 1.2)
    assert phones_of(cuts[2]) == []
    assert cuts[2].supervisions == []
    check_alignment(cuts[2])
    out = capsys.readouterr().out
    assert " 3 " in out
    assert " 2 " in out
    assert "no TextGrid, so no phones, for 1 of 3 utterances, the first is alone" in " ".join(out.split())


def test_recordings_of_a_folder_are_found_by_their_path_with_or_without_suffix(tmp_path: Path) -> None:
    for name in ("b.wav", "sub/b.wav", "sub/long.wav"):
        (tmp_path / "talks" / name).parent.mkdir(parents=True, exist_ok=True)
        seconds = 2.4 if "long" in name else 1.2
        noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE))
        soundfile.write(tmp_path / "talks" / name, noise, SAMPLE_RATE)
    [manifest] = prepare_folder(tmp_path / "talks", tmp_path, max_duration=1.5, heldout=0)
    textgrid(tmp_path / "textgrids" / "b.TextGrid", [(0.0, 1.2, "AA")])
    textgrid(tmp_path / "textgrids" / "sub" / "b.TextGrid", [(0.0, 1.2, "B")])
    textgrid(tmp_path / "textgrids" / "sub" / "long.TextGrid", [(0.0, 1.2, "D"), (1.2, 2.4, "IY")])
    path = prepare_alignments(manifest, tmp_path / "textgrids", tmp_path / "out" / "named.jsonl.gz")
    assert path == tmp_path / "out" / "named.jsonl.gz"
    assert {cut.id: symbols(cut) for cut in read_manifest(path)} == {
        "b.wav": ["AA"], "sub/b.wav": ["B"], "sub/long.wav-000": ["D"], "sub/long.wav-001": ["IY"],
    }  # fmt: skip


def test_a_textgrid_that_could_be_of_several_utterances_is_listed_and_the_others_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    textgrids = tmp_path / "textgrids"
    textgrid(textgrids / "sub" / "b.TextGrid", [(0.0, 1.2, "B")])
    textgrid(textgrids / "good.TextGrid")
    for place in ("p/a", "q/a"):
        textgrid(textgrids / place / "y.TextGrid")
    cuts = aligned(tmp_path, *map(utterance, ["b.wav", "sub/b.wav", "good", "a/y"]))
    assert [cut.id for cut in cuts if phones_of(cut)] == ["good"]
    listed = [line.split("\t") for line in (tmp_path / "out" / "m.refused.tsv").read_text("utf-8").splitlines()]
    y = [str(textgrids / place / "y.TextGrid") for place in ("p/a", "q/a")]
    both = "could be the TextGrid of a/y, and so could {}; leave one of them in the folder"
    owned = "would be the TextGrid of b.wav and of sub/b.wav; name each by its whole id, such as b.wav.TextGrid"
    assert listed == [
        [y[0], both.format(y[1])],
        [y[1], both.format(y[0])],
        [str(textgrids / "sub" / "b.TextGrid"), owned],
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert "3 TextGrids refused, so without phones: 3 utterances (listed in" in said
    assert "no TextGrid, so no phones" not in said
    with pytest.raises(ValueError, match=r"^.*/p/a/y\.TextGrid: could be the TextGrid of a/y, and so could "):
        aligned(tmp_path / "alone", utterance("a/y"), textgrids=textgrids)


@pytest.mark.parametrize(("of_manifest", "of_file"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_of_textgrids_are_the_same_in_any_normal_form(tmp_path: Path, of_manifest: str, of_file: str) -> None:
    """macOS has decomposed ones."""
    for name in ("één.wav", "fünf/sechs"):
        textgrid(tmp_path / "textgrids" / f"{unicodedata.normalize(of_file, name.removesuffix('.wav'))}.TextGrid")
    ids = [unicodedata.normalize(of_manifest, name) for name in ("één.wav", "fünf/sechs")]
    assert all(phones_of(cut) for cut in aligned(tmp_path, *map(utterance, ids)))


def test_names_in_both_normal_forms_are_distinguished(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    for form, symbol in zip(forms, ("AA", "B"), strict=True):
        textgrid(tmp_path / "textgrids" / f"{form}.TextGrid", [(0.0, 1.2, symbol)])
    assert [symbols(cut) for cut in aligned(tmp_path, *map(utterance, forms))] == [["AA"], ["B"]]


def test_phones_may_end_a_frame_after_the_audio_and_no_later(tmp_path: Path) -> None:
    textgrid(tmp_path / "textgrids" / "a.TextGrid")
    [cut] = aligned(tmp_path, utterance("a", 1.18))
    assert phones_of(cut)[-1] == (0.83, 0.35, "sil")
    too_late = r"^a: phones end at 1\.20 s, but its audio at 1\.17 s; align the audio that the manifest lists"
    with pytest.raises(ValueError, match=too_late):
        aligned(tmp_path / "shorter", utterance("a", 1.17), textgrids=tmp_path / "textgrids")
    textgrid(tmp_path / "textgrids" / "talk.TextGrid", [(0.0, 9.0, "AA")])
    with pytest.raises(ValueError, match=r"^talk-000: phones end at 9\.00 s, but its audio at 3\.00 s"):
        aligned(tmp_path / "other", *pieces("talk", 3), textgrids=tmp_path / "textgrids")


def test_checking_refuses_phones_outside_the_audio() -> None:
    def with_phone(start: float, duration: float) -> MonoCut:
        cut = utterance("a", 1.0)
        items = [AlignmentItem("T", 0.0, 0.1), AlignmentItem("AA", start, duration)]
        cut.supervisions = [SupervisionSegment("a", "a", 0.0, 1.0, alignment={"phone": items})]
        return cut

    check_alignment(with_phone(0.5, 0.5))
    check_alignment(with_phone(0.5, 0.525))
    with pytest.raises(ValueError, match=r"^a: phones end at 1\.03 s, but its audio at 1\.00 s; "):
        check_alignment(with_phone(0.5, 0.53))
    with pytest.raises(ValueError, match=r"^a: its phone AA goes from -0\.20 s to 0\.30 s; "):
        check_alignment(with_phone(-0.2, 0.5))
    with pytest.raises(ValueError, match=r"^a: its phone AA goes from 0\.50 s to 0\.40 s; "):
        check_alignment(with_phone(0.5, -0.1))


def test_synthetic_speech_comes_with_phones_that_pass(dev_cuts: CutSet) -> None:
    for cut in dev_cuts:
        check_alignment(cut)
        assert all(frame_phones(phones_of(cut), num_frames(cut.num_samples)))


DAMAGED = {
    "empty": (b"", r"cannot be read as a TextGrid \(the file is empty\); align"),
    "something else": (b"\x00\x01 this is no text", r"\(it does not begin as one, with ooTextFile\); align"),
    "a page of the web": (b"<html>\n<body>not found</body>\n</html>\n", "it does not begin as one, with ooTextFile"),
    "without times": (long_format({"phones": HELLO}, 1.2).replace("xmin", "x").encode(), "Expected field in Textgrid"),
    "half a number": (long_format({"phones": HELLO}, 1.2)[:85].encode(), "it is cut short or corrupt"),
    "UTF-16 cut short": (long_format({"phones": HELLO}, 1.2).encode("utf-16")[:101], "it is not UTF-8, nor UTF-16"),
    "latin-1": (
        long_format({"phones": [(0.0, 1.2, "\xe9")]}, 1.2).encode("latin-1"),
        "it is not UTF-8, nor UTF-16 with its mark",
    ),
    "cut short": (short_format({"phones": HELLO}, 1.2)[:-12].encode(), r"phones end at 0\.83 s of 1\.20 s"),
    "overlapping": (long_format({"phones": [(0.0, 0.7, "T"), (0.6, 1.2, "AA")]}, 1.2).encode(), "overlap"),
    "of words": (long_format({"words": HELLO_WORD}, 1.2).encode(), "no tier called phones, only words; take"),
    "without tiers": (long_format({}, 1.2).encode(), "no tier called phones, nor any other; take"),
}


@pytest.mark.parametrize(("content", "fact"), DAMAGED.values(), ids=DAMAGED)
def test_an_error_names_a_corrupt_textgrid_and_the_reason(tmp_path: Path, content: bytes, fact: str) -> None:
    path = tmp_path / "textgrids" / "a.TextGrid"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=fact) as error:
        aligned(tmp_path, utterance("a"))
    assert str(error.value).startswith(f"{path}: ")
    assert not list((tmp_path / "out").iterdir())


def test_one_bad_textgrid_of_many_is_listed_and_the_others_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["good", *DAMAGED]
    textgrid(tmp_path / "textgrids" / "good.TextGrid")
    textgrid(tmp_path / "textgrids" / "late.TextGrid", [(0.0, 9.0, "AA")])
    # Cut short, of three pieces
    write(tmp_path / "textgrids" / "talk.TextGrid", long_format({"phones": [(0.0, 0.5, "AA")]}, 3.0))
    for name, (content, _) in DAMAGED.items():
        (tmp_path / "textgrids" / f"{name}.TextGrid").write_bytes(content)
    cuts = aligned(tmp_path, *map(utterance, [*names, "late", "alone"]), *pieces("talk", 3))
    assert [cut.id for cut in cuts if phones_of(cut)] == ["good"]
    listed = (tmp_path / "out" / "m.refused.tsv").read_text("utf-8").splitlines()
    expected = [str(tmp_path / "textgrids" / f"{name}.TextGrid") for name in sorted([*DAMAGED, "late", "talk"])]
    assert [line.split("\t")[0] for line in listed] == expected
    for name, (_, fact) in DAMAGED.items():
        [reason] = [line.split("\t")[1] for line in listed if f"/{name}.TextGrid\t" in line]
        assert re.search(fact, reason)
        assert str(tmp_path) not in reason
        assert "Error" not in reason
    said = " ".join(capsys.readouterr().out.split())
    assert "13 TextGrids refused, so without phones: 15 utterances (listed in m.refused.tsv" in said
    assert "no TextGrid, so no phones, for 1 of 17 utterances, the first is alone" in said
    for path in (tmp_path / "textgrids").iterdir():
        textgrid(path, [(0.0, 3.0, "AA")] if path.stem == "talk" else [(0.0, 1.2, "AA")])
    cuts = aligned(tmp_path, *map(utterance, [*names, "late", "alone"]), *pieces("talk", 3))
    assert [cut.id for cut in cuts if not phones_of(cut)] == ["alone"]
    assert not (tmp_path / "out" / "m.refused.tsv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [long_format, short_format])
def test_a_textgrid_that_is_cut_short_is_never_accepted(tmp_path: Path, layout: Writer) -> None:
    whole = layout({"words": HELLO_WORD, "phones": HELLO}, 1.2)
    for size in range(len(whole.rstrip()) - 1):
        write(tmp_path / "textgrids" / "a.TextGrid", whole[:size])
        with pytest.raises(ValueError, match=r"a\.TextGrid: (cannot be read|no tier called phones)"):
            aligned(tmp_path, utterance("a"))


def test_the_folder_above_is_named_where_the_textgrids_have_fewer_folders_than_the_ids(tmp_path: Path) -> None:
    textgrid(tmp_path / "textgrids" / "spoken" / "a.TextGrid")
    sentence = (
        r"such as dev/spoken/a\.TextGrid; .*spoken/a\.TextGrid has its name but not its folders: give the folder above"
    )
    with pytest.raises(ValueError, match=sentence):
        aligned(tmp_path, utterance("dev/spoken/b.wav"), utterance("dev/spoken/a.wav"))


def test_a_folder_without_the_textgrids_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="textgrids: no such folder; give the folder that the Montreal Forced Aligner"):
        aligned(tmp_path, utterance("a"))
    write(tmp_path / "textgrids" / "._a.TextGrid", "what an operating system left there")
    with pytest.raises(ValueError, match="textgrids: no TextGrid below it; give"):
        aligned(tmp_path, utterance("a"))
    textgrid(tmp_path / "textgrids" / "b.TextGrid")
    with pytest.raises(ValueError, match=r"m\.jsonl\.gz: no utterance of 1 has a TextGrid below .*a\.TextGrid;"):
        aligned(tmp_path, utterance("a"))


def test_no_manifest_is_lost(tmp_path: Path) -> None:
    manifest, linked = tmp_path / "m.jsonl.gz", tmp_path / "linked"
    write_manifest([utterance("a")], manifest)
    textgrid(tmp_path / "textgrids" / "a.TextGrid")
    linked.symlink_to(tmp_path)
    before = manifest.read_bytes()
    for out in (manifest, tmp_path, linked):
        with pytest.raises(ValueError, match="is the input manifest, which is never overwritten; choose another"):
            prepare_alignments(manifest, tmp_path / "textgrids", out)
    assert manifest.read_bytes() == before
    write_manifest([utterance("b")], tmp_path / "out" / "m.jsonl.gz")
    with pytest.raises(ValueError, match="exists already and lists other audio; remove it"):
        prepare_alignments(manifest, tmp_path / "textgrids", tmp_path / "out")
    with pytest.raises(ValueError, match="no folder can be made there"):
        prepare_alignments(manifest, tmp_path / "textgrids", manifest / "inside")
    for _ in range(2):
        assert prepare_alignments(manifest, tmp_path / "textgrids", tmp_path / "new") == tmp_path / "new/m.jsonl.gz"


def test_the_command_line_aligns_and_explains_the_treatment_of_stress(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_manifest([utterance("a")], tmp_path / "m.jsonl.gz")
    textgrid(tmp_path / "textgrids" / "a.TextGrid")
    command = [
        "prepare",
        "alignments",
        str(tmp_path / "m.jsonl.gz"),
        str(tmp_path / "textgrids"),
        str(tmp_path / "out"),
    ]
    main(command)
    assert symbols(*read_manifest(tmp_path / "out" / "m.jsonl.gz"))[2] == "AH"
    main([*command, "--drop_stress=false"])
    assert symbols(*read_manifest(tmp_path / "out" / "m.jsonl.gz"))[2] == "AH0"
    with pytest.raises(SystemExit):
        main(["prepare", "alignments", "--help"])
    assert "AH0, AH1 and AH2 as one phone" in " ".join(capsys.readouterr().out.split())


def test_textgrids_of_two_phone_sets_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_manifest([utterance("a"), utterance("b")], tmp_path / "m.jsonl.gz")
    textgrid(tmp_path / "textgrids" / "a.TextGrid")
    textgrid(tmp_path / "textgrids" / "b.TextGrid", [(0.0, 0.5, "ɹ"), (0.5, 0.7, "tʃʰ"), (0.7, 1.2, "")])
    paths = [str(tmp_path / name) for name in ("m.jsonl.gz", "textgrids", "out")]
    with pytest.raises(SystemExit):
        main(["prepare", "alignments", *paths])
    answer = capsys.readouterr().err
    assert "ARPAbet in 1 utterance (a: AH, HH, L, OW) and another set in 1 utterance (b: tʃʰ, ɹ)" in answer
    assert not (tmp_path / "out" / "m.jsonl.gz").exists()


@pytest.mark.parametrize(
    ("source", "name"),
    [("speech.jsonl.gz", "speech.jsonl.gz"), ("v1.5/", "v1.5.jsonl.gz"), ("table.csv", "table.jsonl.gz")],
)
def test_a_folder_of_new_manifests_gets_one_that_can_be_read(source: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / source
    path.mkdir() if source.endswith("/") else path.touch()
    assert destination(path, tmp_path / "aligned", []) == tmp_path / "aligned" / name
