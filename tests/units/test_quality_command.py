import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import TINY, check_figures
from lhotse import CutSet

from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import all_layers_extractor
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.units.proposal import propose
from hubert_lightning.units.quality_command import COLUMNS, quality, read_speech
from hubert_lightning.units.stretches import draw_speech
from hubert_lightning.units.survey import survey


@pytest.fixture(scope="module")
def encoder() -> HubertEncoder:
    torch.manual_seed(0)
    return HubertEncoder(TINY).eval()


@pytest.fixture(scope="module")
def checkpoint(encoder: HubertEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "a.ckpt"
    state = {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"encoder": TINY.__dict__}}, path)
    return path


@pytest.fixture(scope="module")
def folder(dev_cuts: CutSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings without anything known about them."""
    folder = tmp_path_factory.mktemp("plain")
    for number, cut in enumerate(list(dev_cuts)[:4]):
        soundfile.write(folder / f"{number}.wav", read_waveform(cut).numpy(), SAMPLE_RATE)
    return folder


def test_the_command_judges_every_layer_and_number_of_clusters_and_proposes_one_of_them(
    checkpoint: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [str(checkpoint), str(manifests / "train.jsonl.gz"), "--clusters", "10", "20", "--max_frames", "3000"]
    main(["quality", *arguments, "--output", str(tmp_path / "q")])
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "q" / "quality.json").read_text())
    assert kept["surveys"].keys() == {"10", "20"}
    for rows in kept["surveys"].values():
        assert rows.keys() == {"mfcc", "layer 0", "layer 1", "layer 2"}
        unknown = {name for row in rows.values() for name, value in row.items() if value is None}
        assert unknown == {"abx_within", "abx_across"}  # which nobody asked for
    proposal = kept["proposal"]
    assert proposal["layer"] in (1, 2)
    assert str(proposal["clusters"]) in kept["surveys"]
    assert f"proposed: layer {proposal['layer']}, {proposal['clusters']} clusters: {proposal['reason']}" in said
    layers = kept["surveys"][str(kept["clusters"])]
    assert kept["best_layer"] == max((1, 2), key=lambda layer: layers[f"layer {layer}"]["pnmi"])
    assert kept["layer 1"] == layers["layer 1"]
    assert f"best by PNMI: layer {kept['best_layer']}" in said
    assert kept["sample"]["speakers"] == 3
    tables = said.partition("best by PNMI")[0].splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in tables)
    headings = [line.split() for line in tables if line.split()[:1] == ["features"]]
    assert [heading for line in headings for heading in line[1:]] == list(COLUMNS)
    rows = [line.split()[0] for line in tables if re.search(r"\d\.\d\d ", line)]
    assert set(rows) == {"mfcc", "layer", "10", "20"}
    check_figures(tmp_path / "q" / "quality.png", inches=7)


def test_a_plain_folder_is_judged_without_phones_and_speakers(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quality(checkpoint, [folder], tmp_path, clusters=[5])
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "quality.json").read_text())
    assert kept["layer 1"]["pnmi"] is kept["layer 1"]["speaker_information"] is kept["best_layer"] is None
    assert kept["layer 1"]["content"] is not None
    assert kept["sample"]["halves_of"] == "recordings"
    assert "speakers are not known: speaker information is left out" in said
    assert "no utterance has phones" in said


def test_numbers_of_clusters_with_few_frames_are_not_proposed(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quality(checkpoint, [folder], tmp_path, clusters=[5, 100], max_frames=500)
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "quality.json").read_text())
    assert kept["clusters"] == 5
    assert kept["surveys"].keys() == {"5", "100"}
    assert "fewer than 10 frames a cluster for 100 clusters (half of the sample has " in said
    quality(checkpoint, [folder], tmp_path, clusters=[100], max_frames=500)
    said, kept = capsys.readouterr().out, json.loads((tmp_path / "quality.json").read_text())
    assert kept["proposal"] is None
    assert "proposed: layer" not in said
    assert re.search(r"nothing is proposed: half of the sample has \d+ frames, and 100 clusters need 10", said)


def test_units_that_reveal_nothing_of_the_speech_are_not_proposed(encoder: HubertEncoder, train_cuts: CutSet) -> None:
    sample = draw_speech(list(train_cuts), [8], 1500, 0)
    rows = survey(all_layers_extractor(encoder), sample, [8], seed=0)
    assert not propose([replace(row, content=0.01) for row in rows], sample.least).doubt
    nothing = propose([replace(row, content=-0.03) for row in rows], sample.least)
    assert "8 clusters of layer 1, reveals nothing of the speech 40 ms later (-0.03 bits)" in nothing.doubt


def test_one_speaker_has_no_speaker_information(
    checkpoint: Path, dev_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    speaker = next(iter(dev_cuts)).supervisions[0].speaker
    write_manifest([cut for cut in dev_cuts if cut.supervisions[0].speaker == speaker], tmp_path / "one.jsonl.gz")
    quality(checkpoint, [tmp_path / "one.jsonl.gz"], tmp_path, clusters=[5])
    assert json.loads((tmp_path / "quality.json").read_text())["layer 1"]["speaker_information"] is None
    assert "all recordings are of one speaker: speaker information is left out" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers_and_another_sample_others(
    encoder: HubertEncoder, train_cuts: CutSet
) -> None:
    extractor = all_layers_extractor(encoder, with_input=True)
    first, again, other = [
        survey(extractor, draw_speech(list(train_cuts), [8], 1500, seed), [8], seed=seed) for seed in (0, 0, 1)
    ]
    assert first == again
    assert first != other
    assert [row.layer for row in first] == [0, 1, 2]


def test_manifests_with_phones_of_different_sets_are_refused(manifests: Path, dev_cuts: CutSet, tmp_path: Path) -> None:
    def renamed(segment):
        phones = [phone._replace(symbol=f"{phone.symbol}ː") for phone in segment.alignment["phone"]]
        return replace(
            segment, alignment=segment.alignment | {"phone": phones}
        )  # the cuts are those of other tests too

    write_manifest([cut.map_supervisions(renamed) for cut in dev_cuts], tmp_path / "ipa.jsonl.gz")
    with pytest.raises(UserError, match="phones of different sets"):
        read_speech([manifests / "train.jsonl.gz", tmp_path / "ipa.jsonl.gz"])
    assert read_speech([tmp_path / "ipa.jsonl.gz"])  # alone, they can be compared with clusters
    assert read_speech([manifests / "train.jsonl.gz", manifests / "test.jsonl.gz"])


@pytest.mark.parametrize(
    ("clusters", "max_frames", "message"),
    [
        ([2000], 100_000, "too little audio for 2000 clusters"),
        ([50], 20, "max_frames is 20"),
        ([1], 1000, "each K-means has from 2"),
    ],
)
def test_too_few_frames_are_refused(
    clusters: list[int], max_frames: int, message: str, checkpoint: Path, manifests: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        quality(checkpoint, [manifests / "dev.jsonl.gz"], tmp_path, clusters, max_frames)


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such manifest, folder or recording"):
        read_speech([tmp_path / "nothing"])
    with pytest.raises(UserError, match="no audio in this folder"):
        read_speech([tmp_path])


@pytest.mark.parametrize("option", ["--clusters=1", "--clusters=0", "--max_frames=0"])
def test_clusters_that_tell_nothing_apart_are_refused(
    checkpoint: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture, option: str
) -> None:
    with pytest.raises(SystemExit):
        main(["quality", str(checkpoint), f"[{manifests / 'dev.jsonl.gz'}]", option, f"--output={tmp_path / 'out'}"])
    assert ("max_frames is 0" if "max" in option else "each K-means has from 2 to 65536") in capsys.readouterr().err
