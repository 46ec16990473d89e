"""Units, K-means and quality of another speech encoder of transformers, as a user types them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import cut_of, noise_with_pauses
from teacher_models import random_teacher
from torch import Tensor

from hubert_lightning.cli import main
from hubert_lightning.errors import UserError
from hubert_lightning.features.extract import extract_cuts
from hubert_lightning.features.extractors import layer_extractor
from hubert_lightning.frames import HOP, num_frames
from hubert_lightning.pretrained.teacher_config import QUADRATIC_WINDOW
from hubert_lightning.recipes.pretrain import pretraining_recipe
from hubert_lightning.units.kmeans_file import load_kmeans
from hubert_lightning.units.label_recipe import LabelRecipe
from hubert_lightning.units.unit_extractor import Units


def sizes_of_calls(extractor: Any, sizes: list[int]) -> Any:
    """The extractor, which notes the samples of each of its calls."""

    def features(waveform: Tensor, *others: Any) -> Tensor:
        sizes.append(waveform.numel())
        return extractor.features(waveform, *others)  # type: ignore[no-any-return]

    return extractor._replace(features=features)


@pytest.mark.parametrize("family", ["conformer", "WavLM"])  # WavLM is one of our own encoders
def test_a_teacher_sees_bounded_windows_however_long_and_many_the_recordings_are(family: str, tmp_path: Path) -> None:
    random_teacher(family, tmp_path / "model", num_hidden_layers=1)
    extractor = layer_extractor(tmp_path / "model", 1, torch.device("cpu"))
    long = cut_of(tmp_path / "long.wav", noise_with_pauses(65))
    short = [cut_of(tmp_path / f"{number}.wav", noise_with_pauses(1, number)) for number in range(6)]
    largest = []
    for cuts in ([long], [long, *short], short[:2], short):
        sizes: list[int] = []
        rows = next(extract_cuts(sizes_of_calls(extractor, sizes), [cuts], None, batch_duration=2.0, as_whole=True))
        assert [len(features) for features in rows] == [num_frames(cut.num_samples) for cut in cuts]
        largest.append(max(sizes))
    last_window = long.num_samples - (num_frames(long.num_samples) - QUADRATIC_WINDOW) * HOP  # to the last sample
    assert largest == [last_window] * 2 + [32_000] * 2


def test_kmeans_units_and_quality_take_another_encoder(
    tmp_path: Path, manifests: Path, speech: list[Path], capsys: pytest.CaptureFixture
) -> None:
    model, kmeans = tmp_path / "model", tmp_path / "model" / "kmeans.safetensors"
    random_teacher("UniSpeech-SAT", model)
    train = str(manifests / "dev.jsonl.gz")
    main(["kmeans", "fit", str(model), train, str(kmeans), "--layer=2", "--clusters=5", "--max_frames=500"])
    capsys.readouterr()
    main(["units", str(model), str(speech[0])])
    printed = json.loads(capsys.readouterr().out)
    units = Units.from_pretrained(model, device="cpu")
    assert units.source["features"] == load_kmeans(kmeans)[1]["features"]
    assert set(printed["units"]) <= set(range(5))
    with pytest.raises(UserError, match="this package writes HuBERT alone; copy the directory"):
        units.save_pretrained(tmp_path / "saved")
    main(["quality", str(model), train, "--clusters=5", "--max_frames=600", f"--output={tmp_path / 'quality'}"])
    measures = json.loads((tmp_path / "quality" / "quality.json").read_text())
    assert {"mfcc", "layer 1", "layer 2", "layer 3"} <= measures.keys()


def test_a_stream_has_the_units_of_the_file(tmp_path: Path) -> None:
    random_teacher("XLS-R", tmp_path)
    extractor = layer_extractor(tmp_path, 2, torch.device("cpu"))
    units, waveform = Units(extractor, torch.randn(7, 64)), noise_with_pauses(3)
    stream = units.stream(step=1.0, lookahead=1.0, history=5.0)
    parts = [stream.push(chunk) for chunk in waveform.split(7000)]
    assert len(torch.cat([*parts, stream.finish()])) == len(units(waveform, 16_000))


def test_a_recipe_checks_the_layers_of_another_encoder(tmp_path: Path) -> None:
    random_teacher("data2vec", tmp_path)
    LabelRecipe(str(tmp_path), 3).check_layer()
    with pytest.raises(UserError, match="has layers 1 to 3, not layer 4; name one of those"):
        LabelRecipe(str(tmp_path), 4).check_layer()


def test_another_encoder_makes_the_labels_of_a_pre_training_alone(tmp_path: Path) -> None:
    random_teacher("UniSpeech-SAT", tmp_path / "model")
    (tmp_path / "a.jsonl.gz").touch()
    text = pretraining_recipe([tmp_path / "a.jsonl.gz"], tmp_path / "out", init=tmp_path / "model").long_form()[-1]
    assert "pretrain/small" in text
    assert f'"features": "{tmp_path / "model"}", "layer": 2' in text.replace("\\", "")
    assert '"weights"' not in text
    assert "model.init_args.encoder" not in text
