import gzip
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from helpers import export_shar
from lhotse import CutSet, Recording

from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.corpora import Corpora, read_corpora
from hubert_lightning.data.manifest import fingerprint, write_manifest
from hubert_lightning.data.shar import SharCuts, prepare_shar


@pytest.fixture(scope="module")
def table(train_cuts: CutSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shar")
    return prepare_shar(export_shar(train_cuts, folder / "train"), folder / "manifests")


def test_a_table_has_every_cut_and_its_very_samples(table: Path, train_cuts: CutSet) -> None:
    cuts = SharCuts(table)
    assert [cut.id for cut in cuts] == list(cuts.ids()) == [cut.id for cut in train_cuts]
    assert cuts.num_samples.tolist() == [cut.num_samples for cut in cuts] == [cut.num_samples for cut in train_cuts]
    for here, there in zip(cuts, train_cuts, strict=True):
        torch.testing.assert_close(read_waveform(here, 1600, 800), read_waveform(there, 1600, 800), rtol=0, atol=0)


def test_a_cut_holds_the_position_of_its_audio_and_no_samples(table: Path) -> None:
    cuts = SharCuts(table)
    assert len(pickle.dumps(cuts[3])) < 2000
    assert len(pickle.dumps(cuts)) < 200  # what a process that reads audio is sent
    assert pickle.loads(pickle.dumps(cuts))[3] == cuts[3]


def test_other_rates_and_channels_are_read_as_from_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, rate, shape in (("low", 8000, (9000,)), ("stereo", 44_100, (50_000, 2))):
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(size=shape) / 10, rate, subtype="FLOAT")
    recordings = [Recording.from_file(tmp_path / f"{name}.wav", recording_id=name) for name in ("low", "stereo")]
    shar = export_shar(CutSet([recording.to_cut() for recording in recordings]), tmp_path / "shar", "wav")
    cuts = SharCuts(prepare_shar(shar, tmp_path))
    assert [len(read_waveform(cut)) for cut in cuts] == [18_000, 50_000 * 16_000 // 44_100]
    for cut, recording in zip(cuts, recordings, strict=True):
        theirs = read_waveform(recording.resample(16_000).to_cut())
        torch.testing.assert_close(read_waveform(cut), theirs[: cut.num_samples], rtol=0, atol=1e-3)  # 16 bits


def rewritten(cuts: Path, change: Callable[[list[str]], list[str]]) -> None:
    with gzip.open(cuts, "rt") as file:
        lines = file.read().splitlines()
    with gzip.open(cuts, "wt") as file:
        file.write("\n".join(change(lines)) + "\n")


def test_a_listing_in_another_order_than_its_archive_has_the_same_audio(train_cuts: CutSet, tmp_path: Path) -> None:
    shar = export_shar(train_cuts, tmp_path / "shar")
    rewritten(shar / "cuts.000000.jsonl.gz", lambda lines: lines[::-1])
    found = {cut.id: cut for cut in SharCuts(prepare_shar(shar, tmp_path))}
    assert list(found)[:7] == [cut.id for cut in train_cuts][:7][::-1]
    for cut in train_cuts:
        assert torch.equal(read_waveform(found[cut.id], 1600, 800), read_waveform(cut, 1600, 800))


def test_a_cut_that_its_archive_does_not_name_is_refused(train_cuts: CutSet, tmp_path: Path) -> None:
    shar = export_shar(train_cuts, tmp_path / "shar")
    [first, *_] = train_cuts
    rewritten(shar / "cuts.000000.jsonl.gz", lambda lines: [lines[0].replace(first.id, "somebody"), *lines[1:]])
    sentence = (
        rf"cuts\.000000\.jsonl\.gz: somebody is not in recording\.000000\.tar, .* the first {first.id}; export both"
    )
    with pytest.raises(ValueError, match=sentence):
        prepare_shar(shar, tmp_path)


def test_corpora_number_their_cuts_consecutively(
    table: Path, train_cuts: CutSet, dev_cuts: CutSet, tmp_path: Path
) -> None:
    write_manifest(dev_cuts, tmp_path / "dev.jsonl.gz")
    cuts = read_corpora([tmp_path / "dev.jsonl.gz", table])
    names = [cut.id for cut in dev_cuts] + [cut.id for cut in train_cuts]
    assert cuts.sizes == [len(dev_cuts), len(train_cuts)]
    assert [cut.id for cut in cuts] == list(cuts.ids()) == names
    start = len(dev_cuts) - 2
    assert [cut.id for cut in cuts[start : start + 5]] == names[start : start + 5]
    keep = np.array([len(name) % 2 == 0 or place % 3 == 0 for place, name in enumerate(names)])
    assert list(cuts.chosen(keep).ids()) == [name for name, kept in zip(names, keep, strict=True) if kept]
    assert cuts.chosen(keep)[1:].chosen(keep[: keep.sum() - 1]).fingerprint != cuts.chosen(keep).fingerprint
    assert cuts.fingerprint == read_corpora([table, tmp_path / "dev.jsonl.gz"]).fingerprint
    assert Corpora([list(dev_cuts)]).fingerprint == fingerprint(dev_cuts)


@pytest.mark.slow
def test_a_fit_reads_the_same_audio_from_archives_as_from_files(
    table: Path, manifests: Path, train_cuts: CutSet, tmp_path: Path
) -> None:
    """Labels, batches and weights: cuts in the order of their ids lie on the disk in that order, too."""
    assert [cut.id for cut in train_cuts] == sorted(cut.id for cut in train_cuts)
    root = Path(__file__).parents[2]
    weights = []
    for name, train in (("files", manifests / "train.jsonl.gz"), ("archives", table)):
        main(
            [
                "fit",
                *("--config", str(root / "configs/demo.yaml")),
                *("--config", str(root / "tests/smoke.yaml")),
                f"--data.init_args.train=[{train}]",
                "--data.init_args.validation=null",
                "--data.init_args.num_workers=2",
                f"--output={tmp_path / name}",
            ]
        )
        weights.append(torch.load(tmp_path / name / "iteration1" / "last.ckpt", weights_only=True)["state_dict"])
    files, archives = (
        [of.read_bytes() for of in sorted((tmp_path / name).rglob("0*.npy"))] for name in ("files", "archives")
    )
    assert files == archives
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=0)


def test_a_folder_that_is_no_shar_corpus_is_refused(train_cuts: CutSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no cuts\.000000\.jsonl\.gz in it"):
        prepare_shar(tmp_path, tmp_path)
    shar = export_shar(train_cuts, tmp_path / "shar")
    table = prepare_shar(shar, tmp_path / "manifests")
    archive = shar / "recording.000001.tar"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"recording\.000001\.tar: 1000 bytes, \d+ when it was prepared"):
        read_corpora([table])
    with pytest.raises(ValueError, match=r"recording\.000001\.tar: not an archive of recordings|7 cuts, but"):
        prepare_shar(shar, tmp_path)
    archive.unlink()
    with pytest.raises(ValueError, match=r"recording\.000001\.tar: not there"):
        prepare_shar(shar, tmp_path)
    (table / "corpus.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="no table of a Shar corpus"):
        SharCuts(table)


def test_the_same_id_twice_is_refused(train_cuts: CutSet, tmp_path: Path) -> None:
    shar = export_shar(train_cuts.subset(first=7), tmp_path / "shar")
    for name in ("cuts.{}.jsonl.gz", "recording.{}.tar"):
        (shar / name.format("000001")).write_bytes((shar / name.format("000000")).read_bytes())
    with pytest.raises(ValueError, match="is there twice"):
        prepare_shar(shar, tmp_path)


def test_cuts_without_audio_are_left_out_and_counted(
    train_cuts: CutSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shar = export_shar(train_cuts.subset(first=3), tmp_path / "shar")
    archive = shar / "recording.000000.tar"
    with tarfile.open(archive) as before, tarfile.open(tmp_path / "new.tar", "w") as after:
        for number, member in enumerate(before.getmembers()):
            if number in (2, 3):
                member.name = f"{Path(member.name).stem}.{'nodata' if number == 2 else 'nometa'}"
                member.size = 0
                after.addfile(member)
            else:
                after.addfile(member, before.extractfile(member))
    (tmp_path / "new.tar").rename(archive)
    assert len(SharCuts(prepare_shar(shar, tmp_path))) == 2
    assert "1 without audio, or shorter than a frame: left out" in capsys.readouterr().out
