from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, pretraining_data, pretraining_model
from lhotse import CutSet
from lightning import Trainer
from torch import Tensor

from hubert_lightning.data.audio import read_waveform
from hubert_lightning.errors import UserError
from hubert_lightning.features.extractors import combined_extractor, layer_extractor, mfcc_extractor
from hubert_lightning.features.mfcc import mfcc
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.relabelling import Relabel, labelling
from hubert_lightning.units.kmeans import assign
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe
from hubert_lightning.units.label_store import LabelStore

CPU = torch.device("cpu")


def labels_of(manifests: Path, folder: Path, relabel: Relabel) -> LabelStore:
    data = pretraining_data(manifests, num_workers=0)
    trainer = Trainer(default_root_dir=folder, max_steps=0, accelerator="cpu", logger=False, callbacks=[relabel])
    trainer.fit(pretraining_model(num_clusters=relabel.recipe.num_clusters), datamodule=data)
    assert data.labels is not None
    return data.labels


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second teacher, with random weights."""
    model = pretraining_model()
    torch.manual_seed(5)
    model.encoder.initialize()
    path = tmp_path_factory.mktemp("other") / "last.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return str(path)


def test_layers_and_teachers_are_label_streams_as_they_are_alone(
    run: Path, other: str, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    own = str(run / "last.ckpt")
    settings: dict[str, Any] = {"clusters": 12, "max_frames": 1500}
    recipe = Relabel(features=[own, "mfcc", other, own], layer=[2, None, 1, 1], **settings)
    store = labels_of(manifests, tmp_path / "together", recipe)
    assert store.source.clusters == (12, 12, 12, 12)
    centroids, _ = load_kmeans(tmp_path / "together" / "kmeans.safetensors")
    for number, (features, layer) in enumerate([(own, 2), ("mfcc", None), (other, 1), (own, 1)]):
        folder = tmp_path / str(number)
        alone = labels_of(manifests, folder, Relabel(features=features, layer=layer, **settings))
        torch.testing.assert_close(centroids[number], load_kmeans(folder / "kmeans.safetensors")[0][0])
        for cut in dev_cuts:
            np.testing.assert_array_equal(store[cut.id][number], alone[cut.id][0])
    record = recipe.record(store)
    assert record["layer"] == [2, None, 1, 1]
    assert len(set(record["teacher_fingerprint"])) == 3


def test_the_audio_is_read_once_and_a_teacher_computes_its_layers_in_one_pass(
    run: Path, other: str, dev_cuts: CutSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, [cut, *_] = str(run / "last.ckpt"), dev_cuts
    waveform, local_features = read_waveform(cut)[None], HubertEncoder.local_features
    passes: list[HubertEncoder] = []

    def counted(self: HubertEncoder, *args: Any, **options: Any) -> Tensor:
        passes.append(self)
        return local_features(self, *args, **options)

    monkeypatch.setattr(HubertEncoder, "local_features", counted)
    extractor = combined_extractor([(own, 2), (other, 2), ("mfcc", None), (own, 1)], CPU)
    length = torch.tensor([waveform.shape[1]])
    with torch.no_grad():
        rows = extractor(waveform, length)
        assert len(passes) == len(set(passes)) == 2
        layers = load_encoder(own).features_of_layers(waveform, layers=[2, 1])
        expected = [
            layers[0],
            layer_extractor(other, 2, CPU)(waveform, length),
            mfcc(waveform[0])[None, ::2],
            layers[1],
        ]
    assert rows.shape[-1] == extractor.shape[0] == sum(part.shape[-1] for part in expected)
    for columns, part in zip(extractor.columns, expected, strict=True):
        torch.testing.assert_close(rows[..., columns], part)
    assert combined_extractor([("mfcc", None)], CPU).name == mfcc_extractor().name


def test_residuals_are_label_streams_of_what_the_nearest_centroids_leave(
    run: Path, manifests: Path, tmp_path: Path, dev_cuts: CutSet
) -> None:
    own = str(run / "last.ckpt")
    relabel = Relabel(features=own, layer=[1, 2], clusters=9, max_frames=1500, residual=2)
    store = labels_of(manifests, tmp_path, relabel)
    assert store.source.clusters == (9, 9, 9, 9)
    centroids, source = load_kmeans(tmp_path / "kmeans.safetensors")
    assert source["residual"] == "2"
    encoder = load_encoder(own)
    for cut in dev_cuts:
        with torch.no_grad():
            layers = encoder.features_of_layers(read_waveform(cut)[None], layers=[1, 2])
        for number, [features] in enumerate(layers):
            first = assign(features, centroids[2 * number])
            second = assign(features - centroids[2 * number][first], centroids[2 * number + 1])
            np.testing.assert_array_equal(store[cut.id][2 * number], first.numpy())
            np.testing.assert_array_equal(store[cut.id][2 * number + 1], second.numpy())
    made = labelling(tmp_path, store.source.kmeans)["streams"]
    assert made[3]["features"].startswith("residual 1 of layer 2 of encoder ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"features": ["mfcc", "a.ckpt"], "layer": [None]}, "2 features and 1 layers"),
        ({"features": ["mfcc", "a.ckpt"], "layer": [1, 2]}, "'mfcc' with layer 1"),
        ({"features": "a.ckpt", "layer": [1, None]}, "'a.ckpt' with layer None"),
        ({"features": "a.ckpt", "layer": [3, 3]}, "layer 3 of a.ckpt is named twice"),
        ({"features": ["a.ckpt", "b.ckpt"], "layer": "best"}, "'best' of 2 features"),
        ({"features": []}, "empty list"),
        ({"features": "a.ckpt", "layer": []}, "empty list"),
        ({"residual": 0}, "residual is 0"),
        ({"residual": 2, "parts": ["delta"]}, "residual 2 with parts delta"),
        ({"features": ["mfcc", "a.ckpt"], "layer": [None, 1], "parts": ["delta"]}, "only MFCCs have parts"),
    ],
)
def test_streams_that_contradict_each_other_are_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LabelRecipe(**given)  # type: ignore[arg-type]  # as a YAML may give them


def test_a_layer_that_one_of_the_teachers_lacks_is_refused(other: str) -> None:
    recipe = LabelRecipe(features=[other, "previous"], layer=[2, 5])
    with pytest.raises(UserError, match="previous has layers 1 to 4, not layer 5"):
        recipe.check_layer(previous_layers=4)
    with pytest.raises(UserError, match="has layers 1 to 2, not layer 3"):
        LabelRecipe(features=[other, "previous"], layer=3).check_layer(previous_layers=4)
    assert LabelRecipe(features=["mfcc", "previous"], layer=2).after(other).sources == [("mfcc", None), (other, 2)]
    assert TINY.num_layers == 2
