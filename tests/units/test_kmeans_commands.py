"""K-means in and out, as a user types it; and a fit on a quantizer that somebody else fitted."""

import json
import shutil
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from helpers import SMOKE, pretraining_options, refused
from sklearn.cluster import MiniBatchKMeans

from hubert_lightning.cli import main
from hubert_lightning.data.workers import default_workers
from hubert_lightning.features.extractors import layer_extractor
from hubert_lightning.units.foreign_kmeans import SOURCE
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_commands import export_kmeans, import_kmeans
from hubert_lightning.units.kmeans_file import kmeans_fingerprint, load_kmeans, save_kmeans
from hubert_lightning.units.label_store import LabelStore

SOURCE_OF_OURS = {"features": "mfcc", "seed": "0", "kmeans": 'KMeans{"restarts": 3}', "words": "Größe\n"}


def rows(count: int, dim: int = 39, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_what_is_exported_and_imported_is_the_same_to_the_bit(tmp_path: Path) -> None:
    ours, theirs, back = (tmp_path / name for name in ("ours.safetensors", "theirs.joblib", "back.safetensors"))
    save_kmeans(ours, [rows(500, 768)], SOURCE_OF_OURS)
    export_kmeans(ours, theirs)
    import_kmeans(theirs, back)
    assert back.read_bytes() == ours.read_bytes()
    assert load_kmeans(theirs)[1] == SOURCE_OF_OURS


def test_what_is_exported_predicts_in_scikit_learn_what_we_assign(tmp_path: Path) -> None:
    save_kmeans(tmp_path / "ours.safetensors", [rows(50)], SOURCE_OF_OURS)
    export_kmeans(tmp_path / "ours.safetensors", tmp_path / "theirs.joblib")
    theirs, features = joblib.load(tmp_path / "theirs.joblib"), rows(3000, seed=1)
    assert isinstance(theirs, MiniBatchKMeans)
    # fairseq ApplyKmeans: distances to these, no method of the class
    np.testing.assert_array_equal(theirs.cluster_centers_.transpose(), rows(50).numpy().T)
    nearest = np.sort(theirs.transform(features.numpy()), axis=1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-4  # of two that are as near, either may be chosen
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(theirs.predict(features.numpy())[clear], assign(features, rows(50)).numpy()[clear])


def test_every_stream_is_exported_to_a_file_of_its_own(tmp_path: Path) -> None:
    save_kmeans(tmp_path / "ours.safetensors", [rows(5), rows(9)], SOURCE_OF_OURS)
    export_kmeans(tmp_path / "ours.safetensors", tmp_path / "theirs.joblib")
    assert sorted(path.name for path in tmp_path.glob("theirs*")) == ["theirs.0.joblib", "theirs.1.joblib"]
    [second], source = load_kmeans(tmp_path / "theirs.1.joblib")
    assert torch.equal(second, rows(9))
    assert source == SOURCE_OF_OURS | {"stream": "1"}


def test_a_source_that_is_none_is_refused(tmp_path: Path) -> None:
    kmeans = MiniBatchKMeans(5, n_init=1).fit(rows(50).numpy())
    for said in ("{", "[3]", '{"features": 3}', "[" * 100_000):
        setattr(kmeans, SOURCE, said)
        joblib.dump(kmeans, tmp_path / "theirs.joblib")
        with pytest.raises(ValueError, match=r"theirs.joblib: the source of its centroids is not in our format"):
            load_kmeans(tmp_path / "theirs.joblib")


def test_an_import_says_what_it_is_of_as_a_fit_does(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    joblib.dump(MiniBatchKMeans(5, n_init=1).fit(rows(50, 32).numpy()), tmp_path / "theirs.bin")
    arguments = (str(tmp_path / "theirs.bin"), str(tmp_path / "ours.safetensors"))
    main(["kmeans", "import", *arguments, f"--model={run / 'last.ckpt'}", "--layer=2"])
    assert "5 clusters of 32 dimensions" in capsys.readouterr().out
    source = load_kmeans(tmp_path / "ours.safetensors")[1]
    assert source["features"] == layer_extractor(run / "last.ckpt", 2, torch.device("cpu")).name
    assert source["imported"] == "scikit-learn MiniBatchKMeans"
    assert source["file"] == "theirs.bin"


def test_an_import_of_other_features_is_refused_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    joblib.dump(MiniBatchKMeans(5, n_init=1).fit(rows(50, 31).numpy()), tmp_path / "theirs.bin")
    save_kmeans(tmp_path / "ours.safetensors", [rows(5, 32)], SOURCE_OF_OURS)
    model, out = f"--model={run / 'last.ckpt'}", str(tmp_path / "out.safetensors")
    for file, options, sentence in (
        ("theirs.bin", [model, "--layer=2"], "centroids of 31 dimensions, where layer 2 of encoder"),
        ("ours.safetensors", [model, "--layer=2"], "fitted on mfcc, but the features are layer 2 of encoder"),
        ("theirs.bin", [model, "--layer=3"], "has layers 1 to 2, not layer 3"),
        ("theirs.bin", [model], "a model needs one"),
        ("theirs.bin", ["--layer=3"], "layer and parts are options of a model; name the model"),
        ("nowhere.bin", [], "nowhere.bin: no such file"),
    ):
        assert sentence in refused(capsys, "kmeans", "import", str(tmp_path / file), out, *options)
        assert not Path(out).exists()


def test_what_is_there_is_not_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(run / "kmeans.safetensors")
    before = Path(path).read_bytes()
    for arguments in (["import", path, path], ["export", path, path], ["fit", "mfcc", "[none.jsonl.gz]", path]):
        assert "exists already" in refused(capsys, "kmeans", *arguments)
    assert Path(path).read_bytes() == before


def test_a_fit_is_written_to_a_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = refused(capsys, "kmeans", "fit", "mfcc", "[none.jsonl.gz]", str(tmp_path / "km.txt"))
    assert "km.txt: not a name of a K-means file; choose one that ends in .safetensors" in said


def test_a_fit_outside_of_a_run_is_that_of_a_run(run: Path, manifests: Path, tmp_path: Path) -> None:
    train = f"[{manifests / 'train.jsonl.gz'}]"
    options = ["--clusters=20", "--max_frames=3000", "--num_workers=0"]
    main(["kmeans", "fit", "mfcc", train, str(tmp_path / "mfcc.safetensors"), *options])
    assert (tmp_path / "mfcc.safetensors").read_bytes() == (run / "kmeans.safetensors").read_bytes()


@pytest.mark.slow
def test_a_fit_reads_audio_with_no_more_processes_than_cores(
    run: Path, manifests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("hubert_lightning.data.workers.usable_cores", lambda: 2)
    assert [default_workers(), default_workers(1)] == [2, 1]
    train = f"[{manifests / 'train.jsonl.gz'}]"
    main(["kmeans", "fit", "mfcc", train, str(tmp_path / "k.safetensors"), "--clusters=20", "--max_frames=3000"])
    assert not [warning for warning in recwarn if "worker processes" in str(warning.message)]
    assert (tmp_path / "k.safetensors").read_bytes() == (run / "kmeans.safetensors").read_bytes()


@pytest.mark.slow
def test_a_layer_can_be_fitted_outside_of_a_run(run: Path, manifests: Path, tmp_path: Path) -> None:
    train = f"[{manifests / 'train.jsonl.gz'}]"
    options = ["--layer=2", "--clusters=[5, 9]", "--max_frames=2000", "--num_workers=0", "--seed=1"]
    main(["kmeans", "fit", str(run / "last.ckpt"), train, str(tmp_path / "layer2.safetensors"), *options])
    centroids, source = load_kmeans(tmp_path / "layer2.safetensors")
    assert [tuple(of.shape) for of in centroids] == [(5, 32), (9, 32)]
    assert source["features"] == layer_extractor(run / "last.ckpt", 2, torch.device("cpu")).name
    assert source["seed"] == "1"
    assert source["manifest"] == load_kmeans(run / "kmeans.safetensors")[1]["manifest"]


@pytest.mark.slow
def test_an_iteration_trains_on_a_quantizer_and_goes_on_with_it(
    run: Path, manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    quantizer, output = tmp_path / "released.bin", tmp_path / "run"
    joblib.dump(MiniBatchKMeans(10, n_init=1).fit(rows(500, 32).numpy()), quantizer)

    def command(steps: int, clusters: int = 10) -> list[str]:
        labels = f"features: {run / 'last.ckpt'}, layer: 2, clusters: {clusters}, quantizer: {quantizer}"
        return [
            *SMOKE,
            *pretraining_options(manifests),
            f"--iterations=[{{{labels}, max_steps: {steps}}}]",
            f"--output={output}",
        ]

    said = refused(capsys, "fit", *command(2, clusters=11))
    assert "iterations.1: " in said
    assert "a K-means with [10] clusters, but [11] are requested" in said
    main(["fit", *command(2)])
    theirs = load_kmeans(quantizer)[0]
    assert LabelStore(output / "iteration1" / "labels").source.kmeans == kmeans_fingerprint(theirs)
    shutil.move(quantizer, tmp_path / "elsewhere.bin")
    quantizer = tmp_path / "elsewhere.bin"
    main(["fit", *command(3)])
    assert torch.load(output / "iteration1" / "last.ckpt", weights_only=True)["global_step"] == 3
    joblib.dump(MiniBatchKMeans(10, n_init=1).fit(rows(500, 32, seed=1).numpy()), quantizer)
    assert "its checkpoints were trained on labels of other features" in refused(capsys, "fit", *command(4))


def test_files_of_a_product_code_say_of_which_part_they_are(
    manifests: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train = f"[{manifests / 'train.jsonl.gz'}]"
    options = ["--clusters=[5, 7]", "--parts=[delta, cepstra]", "--max_frames=500", "--num_workers=0"]
    main(["kmeans", "fit", "mfcc", train, str(tmp_path / "product.safetensors"), *options])
    centroids, _ = load_kmeans(tmp_path / "product.safetensors")
    assert [tuple(of.shape) for of in centroids] == [(5, 39), (7, 39)] * 2
    main(["kmeans", "export", str(tmp_path / "product.safetensors"), str(tmp_path / "km.joblib")])
    for stream, part in enumerate(("delta", "delta", "cepstra", "cepstra")):
        assert json.loads(load_kmeans(tmp_path / f"km.{stream}.joblib")[1]["parts"]) == [part]
    last, out = str(tmp_path / "km.3.joblib"), str(tmp_path / "alone.safetensors")
    assert "but parts are" in refused(capsys, "kmeans", "import", last, out, "--model=mfcc", "--parts=[delta]")
    main(["kmeans", "import", last, out, "--model=mfcc", "--parts=[cepstra]"])
    source = load_kmeans(Path(out))[1]
    assert (source["features"], source["parts"]) == ("mfcc spliced over 3 frames", '["cepstra"]')
