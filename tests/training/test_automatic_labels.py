import json
from pathlib import Path

import pytest
import torch
from helpers import SMOKE, pretraining_data, pretraining_model, pretraining_options
from lightning import Trainer

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.training.iterations import Iteration, check_clusters_before, check_iteration
from hubert_lightning.training.relabelling import Relabel
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe
from hubert_lightning.units.label_store import LabelStore

AUTOMATIC = (
    "--iterations=[{features: mfcc, clusters: auto, max_frames: 2500, max_steps: 1},"
    "{features: previous, layer: auto, clusters: auto, max_frames: 2500, max_steps: STEPS}]"
)


def test_layer_and_clusters_are_chosen_for_labels_and_heads_and_remembered(
    run: Path, manifests: Path, tmp_path: Path
) -> None:
    features = str(run / "last.ckpt")

    def fitted() -> tuple[Trainer, torch.nn.Module]:
        relabel = Relabel(features, layer="auto", clusters="auto", max_frames=2500)
        trainer = Trainer(
            default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, callbacks=[relabel],
            enable_progress_bar=False,
        )  # fmt: skip
        model = pretraining_model(num_clusters=500)
        trainer.fit(model, datamodule=pretraining_data(manifests, num_workers=0))
        return trainer, model

    _, model = fitted()
    kept = json.loads((tmp_path / "layers.json").read_text())
    assert kept["clusters"] in (50, 100)  # 1250 frames are too few for more
    rows = [(float(kept["surveys"][k][f"layer {n}"]["content"]), n, int(k)) for k in ("50", "100") for n in (1, 2)]
    of_layers = {layer: sum(content for content, n, _ in rows if n == layer) for layer in (1, 2)}
    assert kept["best_layer"] == max(of_layers, key=lambda layer: of_layers[layer])
    assert max(row for row in rows if row[1] == kept["best_layer"])[2] == kept["clusters"]
    assert "layer 0" in kept["surveys"]["50"]
    assert model.num_clusters == [kept["clusters"]] == list(LabelStore(tmp_path / "labels").source.clusters)
    assert model.hparams["num_clusters"] == kept["clusters"]
    assert model.predictors[0].codewords.shape[0] == kept["clusters"]
    assert load_kmeans(tmp_path / "kmeans.safetensors")[1]["features"].startswith(f"layer {kept['best_layer']} of ")
    before = (tmp_path / "layers.json").stat().st_mtime_ns
    fitted()
    assert (tmp_path / "layers.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_fit_of_iterations_that_chooses_resumes_with_the_same_choice(manifests: Path, tmp_path: Path) -> None:
    def fit(steps: int) -> None:
        options = [*pretraining_options(manifests), AUTOMATIC.replace("STEPS", str(steps))]
        main(["fit", *SMOKE, *options, f"--output={tmp_path}"])

    fit(1)
    records = [json.loads((tmp_path / f"iteration{n}" / "layers.json").read_text()) for n in (1, 2)]
    assert records[0]["best_layer"] is None
    assert records[1]["best_layer"] in (1, 2)
    fit(2)
    for number, record in enumerate(records, start=1):
        folder = tmp_path / f"iteration{number}"
        assert json.loads((folder / "layers.json").read_text()) == record
        state = torch.load(folder / "last.ckpt", weights_only=True)
        assert state["state_dict"]["predictors.0.codewords"].shape[0] == record["clusters"]
        assert state["global_step"] == number
    (tmp_path / "iteration2" / "layers.json").unlink()  # then the checkpoint says how many, and the choice is the same
    fit(3)
    assert json.loads((tmp_path / "iteration2" / "layers.json").read_text()) == records[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer": "auto"}, "MFCCs have no layers"),
        ({"clusters": "auto", "parts": ["delta"]}, "clusters 'auto' of parts delta"),
        ({"features": "a.ckpt", "layer": "best", "clusters": "auto"}, "give layer: auto"),
        (
            {"features": "a.ckpt", "layer": 1, "clusters": "auto", "quantizer": Path("k")},
            "has its own number of clusters",
        ),
        (
            {"features": "a.ckpt", "layer": "auto", "quantizer": Path("k")},
            "was fitted on one layer, but layer is 'auto'",
        ),
        ({"features": ["a.ckpt", "b.ckpt"], "layer": "auto"}, "name a layer of each"),
        ({"features": ["a.ckpt", "mfcc"], "layer": [1, None], "clusters": "auto"}, "clusters 'auto' of 2 features"),
    ],
)
def test_what_cannot_be_chosen_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LabelRecipe(**settings)


def test_continued_trainings_name_their_clusters() -> None:
    automatic = Iteration("previous", "auto", "auto", max_steps=10, relabel_every=5)
    with pytest.raises(UserError, match=r"iterations\.2\.clusters is 'auto', but a continued training"):
        check_iteration(automatic, 2, 2)
    with pytest.raises(UserError, match=r"iterations\.2 continues an iteration with clusters 'auto'"):
        check_clusters_before([Iteration(clusters="auto"), Iteration("previous", 1, 500, weights="continued")])


def test_heads_of_another_model_are_not_replaced(run: Path, manifests: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        callbacks=[Relabel(clusters="auto", max_frames=2500)],
    )  # fmt: skip
    model = pretraining_model(num_clusters=20, pretrained=run / "last.ckpt", keep_head=True)
    with pytest.raises(UserError, match="keep_head keeps the clusters of another model"):
        trainer.fit(model, datamodule=pretraining_data(manifests, num_workers=0))


def test_too_little_speech_for_any_number_is_refused(manifests: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        callbacks=[Relabel(clusters="auto", max_frames=600)],
    )  # fmt: skip
    with pytest.raises(UserError, match="clusters: auto chooses from 50, 100, 200, 500 clusters, of 10 frames each"):
        trainer.fit(pretraining_model(num_clusters=500), datamodule=pretraining_data(manifests, num_workers=0))
