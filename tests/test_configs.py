"""Every YAML in configs/ parses as it stands; with a smoke layer on top, each takes two real steps."""

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchaudio
import yaml
from helpers import FINETUNING_CONFIGS, PRETRAINING_CONFIGS, ROOT, SPLITS, parsed_config
from torch import nn

from hubert_lightning.cli import main
from hubert_lightning.frames import SAMPLE_RATE, Clock
from hubert_lightning.model.config import KERNELS, STRIDES, EncoderConfig
from hubert_lightning.model.prediction import ClusterPredictor
from hubert_lightning.training.pretraining import HubertPretraining, base_optimizer
from hubert_lightning.training.pretraining_data import PretrainingData
from hubert_lightning.units.label_store import LabelStore

SCRATCH = {
    ROOT / "configs/finetune/small-scratch.yaml": FINETUNING_CONFIGS[-2],
    ROOT / "configs/demo-scratch.yaml": FINETUNING_CONFIGS[-1],
}
LARGER = [ROOT / f"configs/finetune/{size}/{split}.yaml" for size in ("large", "xlarge") for split in SPLITS]
RATE = ROOT / "configs/pretrain/size/25hz.yaml"
SIZES = sorted({*(ROOT / "configs/pretrain/size").glob("*.yaml")} - {RATE})
ABLATIONS = sorted((ROOT / "configs/pretrain/ablations").glob("*.yaml"))


def config_name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def assert_runs_alone(kept: Path) -> None:
    """The config in a run's folder says all of it, in words that another process understands."""
    assert "Unable to serialize" not in kept.read_text()
    given, again = yaml.safe_load(kept.read_text()), parsed_config("--config", str(kept)).config.fit
    encoder = json.loads(json.dumps(again.model.init_args.encoder.as_dict()))  # tuples are lists in YAML
    assert encoder == given["model"]["init_args"]["encoder"]


def test_every_file_is_one_of_these() -> None:
    sweeps = (ROOT / "configs/sweeps").glob("*.yaml")
    assert {*PRETRAINING_CONFIGS, *FINETUNING_CONFIGS, *LARGER, *SIZES, RATE, *SCRATCH, *ABLATIONS, *sweeps} == set(
        (ROOT / "configs").rglob("*.yaml")
    )


@pytest.mark.parametrize("path", [*PRETRAINING_CONFIGS, *FINETUNING_CONFIGS], ids=config_name)
def test_a_config_parses_as_it_stands(path: Path) -> None:
    config = parsed_config("--config", str(path)).config.fit
    given = yaml.safe_load(path.read_text())
    assert config.output == given["output"]
    assert config.model.class_path.endswith(given["model"]["class_path"].split(".")[-1])
    for key, value in given["trainer"].items():
        if key not in ("logger", "callbacks"):  # these become class paths with all their arguments
            there = config.trainer[key]
            assert (there.class_path if isinstance(value, dict) else there) == (
                value["class_path"] if isinstance(value, dict) else value
            )


@pytest.mark.parametrize("size", SIZES, ids=config_name)
def test_a_size_is_a_layer_over_a_pre_training_config(size: Path) -> None:
    asked = yaml.safe_load(size.read_text())["model"]["init_args"]
    base, recipe = (str(ROOT / "configs/pretrain" / name) for name in ("base.yaml", size.name))
    for args in (["--config", base, "--config", str(size)], ["--config", recipe]):  # a recipe has its size in it
        model = parsed_config(*args).config.fit.model.init_args
        assert {key: model.encoder[key] for key in asked["encoder"]} == asked["encoder"]
        assert model.final_dim == asked["final_dim"]


@pytest.mark.parametrize("config", ["base.yaml", "small.yaml", "large.yaml"])
def test_25_hz_is_a_layer_over_any_pre_training_config(config: str) -> None:
    layers = [f"--config={ROOT / 'configs/pretrain' / config}", f"--config={RATE}"]
    fit, plain = (parsed_config(*layers[:number]).config.fit for number in (2, 1))
    encoder, standard = (EncoderConfig(**given.model.init_args.encoder.as_dict()) for given in (fit, plain))
    assert encoder == replace(standard, conv_kernels=(*KERNELS, 2), conv_strides=(*STRIDES, 2))
    assert encoder.clock == Clock(hop=640, window=720)
    masked, usual = (given.data.init_args.mask_length * encoder.clock.hop for given in (fit, plain))
    assert masked * 2 == usual


@pytest.mark.parametrize("ablation", ABLATIONS, ids=config_name)
def test_an_ablation_takes_real_steps(ablation: Path, run: Path, manifests: Path, tmp_path: Path) -> None:
    [asked] = yaml.safe_load(ablation.read_text())["iterations"]
    layers = [ROOT / "configs/pretrain/base.yaml", ablation, ROOT / "tests/smoke.yaml"]
    iteration = asked | {"max_frames": 5000, "max_steps": 2}
    if asked["features"] != "mfcc":
        iteration |= {"features": str(run / "last.ckpt"), "layer": 2}
    main(
        [
            "fit",
            *(f"--config={layer}" for layer in layers),
            f"--iterations=[{json.dumps(iteration)}]",
            f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]",
            f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]",
            f"--output={tmp_path / 'run'}",
        ]
    )
    folder = tmp_path / "run" / "iteration1"
    streams = LabelStore(folder / "labels").source.clusters
    sizes = asked["clusters"] if isinstance(asked["clusters"], list) else [asked["clusters"]]
    assert list(streams) == sizes * len(asked.get("parts", [None]))
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 2


SIZES_OF_TORCHAUDIO = {
    "base": (torchaudio.models.hubert_pretrain_base, torchaudio.pipelines.HUBERT_BASE),
    "large": (torchaudio.models.hubert_pretrain_large, torchaudio.pipelines.HUBERT_LARGE),
    "xlarge": (torchaudio.models.hubert_pretrain_xlarge, torchaudio.pipelines.HUBERT_XLARGE),
}


def built_by_torchaudio(size: str, **options: int) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        # Weights on the meta device have no numbers to draw
        patch.setattr("torchaudio.models.wav2vec2.model._init_hubert_pretrain_model", lambda module: None)
        return SIZES_OF_TORCHAUDIO[size][0](**options)


@pytest.mark.parametrize("size", SIZES_OF_TORCHAUDIO)
def test_a_recipe_has_the_size_and_the_dropouts_of_torchaudio(size: str) -> None:
    reference = built_by_torchaudio(size)
    convolutions = reference.wav2vec2.feature_extractor.conv_layers
    encoder = reference.wav2vec2.encoder
    transformer, layer = encoder.transformer, encoder.transformer.layers[0]
    positions = transformer.pos_conv_embed.conv
    group = isinstance(convolutions[0].layer_norm, nn.GroupNorm)
    expected = EncoderConfig(
        conv_channels=convolutions[0].conv.out_channels,
        conv_norm="group" if group else "layer",
        conv_bias=convolutions[0].conv.bias is not None,
        dim=layer.attention.embed_dim,
        num_layers=len(transformer.layers),
        num_heads=layer.attention.num_heads,
        ffn_dim=layer.feed_forward.intermediate_dense.out_features,
        pre_norm=layer.layer_norm_first,
        pos_kernel=positions.kernel_size[0],
        pos_groups=positions.groups,
        normalize_waveform=SIZES_OF_TORCHAUDIO[size][1]._normalize_waveform,  # the model leaves it to its user
        dropout=transformer.dropout.p,
        attention_dropout=layer.attention.dropout,
        activation_dropout=layer.feed_forward.intermediate_dropout.p,
        input_dropout=encoder.feature_projection.dropout.p,
        layer_drop=transformer.layer_drop,
        feature_grad_mult=1.0 if reference.feature_grad_mult is None else reference.feature_grad_mult,
    )
    # Where we have one number for several of the reference's
    assert {layer.dropout.p, layer.feed_forward.output_dropout.p} == {expected.dropout}
    assert tuple(convolution.conv.kernel_size[0] for convolution in convolutions) == KERNELS
    assert tuple(convolution.conv.stride[0] for convolution in convolutions) == STRIDES
    assert [convolution.layer_norm is None for convolution in convolutions] == [False] + 6 * [group]

    model = parsed_config("--config", str(ROOT / "configs/pretrain" / f"{size}.yaml")).config.fit.model.init_args
    assert EncoderConfig(**model.encoder.as_dict()) == expected
    assert model.final_dim == reference.logit_generator.final_proj.out_features


@pytest.mark.parametrize("size", SIZES_OF_TORCHAUDIO)
def test_a_recipe_has_the_head_of_torchaudio(size: str) -> None:
    """Each iteration's: torchaudio builds the head of Large and XLarge for 500 clusters, that of Base for any."""
    cli = parsed_config("--config", str(ROOT / "configs/pretrain" / f"{size}.yaml")).config.fit
    model = cli.model.init_args
    for iteration in cli.iterations:
        head = built_by_torchaudio(
            size, **({"num_classes": iteration.clusters} if size == "base" else {})
        ).logit_generator
        with torch.device("meta"):
            ours = ClusterPredictor(
                model.encoder.dim, iteration.clusters, model.final_dim, model.temperature, model.normal_codewords
            )
        assert ours.codewords.shape == head.label_embeddings.shape
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize(
    ("size", "rate", "clip", "max_tokens"),
    # optimization.lr, optimization.clip_norm and dataset.max_tokens (samples on each GPU) of fairseq
    # examples/hubert/config/pretrain/hubert_{base_librispeech,large_librivox,xlarge_librivox}.yaml; torchaudio's models
    # hold none of these
    [("base", 5e-4, 10.0, 1_400_000), ("large", 1.5e-3, 1.0, 900_000), ("xlarge", 3e-3, 1.0, 360_000)],
)
def test_a_recipe_has_the_optimisation_of_fairseq(size: str, rate: float, clip: float, max_tokens: int) -> None:
    config = parsed_config("--config", str(ROOT / "configs/pretrain" / f"{size}.yaml")).config.fit
    model, named = config.model.init_args, config.model.init_args.optimizer
    weight = [nn.Parameter(torch.zeros(1))]
    optimizer = base_optimizer(weight) if named is None else torch.optim.AdamW(weight, **named.init_args.as_dict())
    assert named is None or named.class_path.split(".")[-1] == "AdamW"
    assert optimizer.defaults["lr"] == rate
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.98)
    assert (optimizer.defaults["eps"], optimizer.defaults["weight_decay"]) == (1e-6, 0.01)  # the same in all three
    # Of the steps, HuBERT §IV-C; fairseq's configs have 32 000 of 400 000
    assert (model.warmup, model.warmup_steps) == (0.08, None)
    assert (model.masked_weight, model.temperature, model.feature_penalty) == (1, 0.1, 10)
    assert config.trainer.gradient_clip_val == clip
    assert config.data.init_args.max_duration == max_tokens / SAMPLE_RATE


def test_defaults_are_those_of_fairseq_for_base() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(PretrainingData).parameters.items()}
    masks = built_by_torchaudio("base").mask_generator
    assert (defaults["mask_prob"], defaults["mask_length"]) == (masks.mask_prob, masks.mask_length) == (0.8, 10)
    # fairseq hubert_base_librispeech.yaml, in samples: dataset.max_tokens, task.max_sample_size, task.min_sample_size
    samples = [defaults[name] * SAMPLE_RATE for name in ("max_duration", "max_crop", "min_duration")]
    assert samples == [1_400_000, 250_000, 32_000]
    optimizer = HubertPretraining().optimizer([nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["eps"], optimizer.defaults["weight_decay"]) == (1e-6, 0.01)  # the same file's optimizer


@pytest.mark.parametrize("layer", SCRATCH, ids=config_name)
def test_scratch_is_a_layer_that_forgets_what_was_pre_trained(layer: Path) -> None:
    model = parsed_config("--config", str(SCRATCH[layer]), "--config", str(layer)).config.fit.model.init_args
    recipe = {"configs/demo-scratch.yaml": "demo.yaml", "configs/finetune/small-scratch.yaml": "pretrain/small.yaml"}
    pretraining = parsed_config("--config", str(ROOT / "configs" / recipe[str(layer.relative_to(ROOT))]))
    encoder = pretraining.config.fit.model.init_args.encoder
    assert model.pretrained is None
    assert not model.freeze_convolutions
    for size in ("conv_channels", "dim", "num_layers", "num_heads", "ffn_dim", "pos_kernel", "conv_norm", "pre_norm"):
        assert model.encoder[size] == encoder[size]


class Cell(NamedTuple):
    """Fine-tuning of one size on one split."""

    max_steps: int
    lr: float
    mask_prob: float
    channel_mask_prob: float
    layer_drop: float
    freeze_steps: int
    max_tokens: int  # samples of a batch
    batches: int  # of a step: GPUs times update_freq


# fairseq examples/wav2vec/config/finetuning/base_{10m,1h,10h,100h,960h}.yaml and vox_*.yaml, for Large; X-Large has
# Large's in batches of half the length (HuBERT §IV-D: 200, 80 and 40 s on each GPU)
BASE_CELLS = {
    "10min": Cell(13_000, 5e-5, 0.65, 0.25, 0.1, 10_000, 3_200_000, 2 * 4),
    "1h": Cell(13_000, 5e-5, 0.65, 0.25, 0.1, 10_000, 3_200_000, 2 * 4),
    "10h": Cell(20_000, 5e-5, 0.65, 0.5, 0.05, 10_000, 3_200_000, 2 * 4),
    "100h": Cell(80_000, 3e-5, 0.65, 0.5, 0.1, 0, 3_200_000, 2 * 4),
    "960h": Cell(320_000, 1e-4, 0.5, 0.1, 0.1, 0, 3_200_000, 8),
}
LARGE_CELLS = {
    "10min": Cell(13_000, 1e-4, 0.65, 0.25, 0.1, 10_000, 1_280_000, 4 * 5),
    "1h": Cell(13_000, 3e-4, 0.75, 0.25, 0.1, 10_000, 1_280_000, 4 * 5),
    "10h": Cell(20_000, 1e-4, 0.75, 0.25, 0.1, 10_000, 1_280_000, 4 * 5),
    "100h": Cell(80_000, 3e-5, 0.5, 0.5, 0.1, 10_000, 1_280_000, 4 * 5),
    "960h": Cell(320_000, 3e-5, 0.5, 0.25, 0.1, 10_000, 1_280_000, 24),
}
CELLS = {
    "base": BASE_CELLS,
    "large": LARGE_CELLS,
    "xlarge": {
        split: cell._replace(max_tokens=cell.max_tokens // 2, batches=cell.batches * 2)
        for split, cell in LARGE_CELLS.items()
    },
}


def layers(size: str, split: str) -> list[str]:
    """The options by which a cell is fitted: Base's config, Large's over it, X-Large's over that."""
    folders = {"base": [""], "large": ["", "large"], "xlarge": ["", "large", "xlarge"]}[size]
    return [f"--config={ROOT / 'configs/finetune' / folder / split}.yaml" for folder in folders]


@pytest.mark.parametrize("size", CELLS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_fine_tuning_config_has_the_values_of_wav2vec_2(size: str, split: str) -> None:
    config = parsed_config(*layers(size, split)).config.fit
    model, data, trainer = config.model.init_args, config.data.init_args, config.trainer
    cell, rate = CELLS[size][split], model.optimizer.init_args
    assert (
        Cell(
            trainer.max_steps,
            rate.lr,
            data.mask_prob,
            data.channel_mask_prob,
            model.layer_drop,
            model.freeze_steps,
            round(data.max_duration * SAMPLE_RATE),
            trainer.devices * trainer.accumulate_grad_batches,
        )
        == cell
    )
    step = data.max_duration * trainer.accumulate_grad_batches * trainer.devices
    assert step == (1920 if split == "960h" and size != "base" else 1600)  # seconds

    # The same in all of fairseq's: Adam without weight decay, tri-stage .1/.4/.5, dropout of activations alone
    assert model.optimizer.class_path.endswith("AdamW")
    assert (tuple(rate.betas), rate.eps, rate.weight_decay) == ((0.9, 0.98), 1e-8, 0)
    assert (model.warmup, model.decay) == (0.1, 0.5)
    assert (data.mask_length, data.channel_mask_length) == (10, 64)
    assert (model.dropout, model.attention_dropout, model.input_dropout, model.activation_dropout) == (0, 0, 0, 0.1)
    assert model.freeze_convolutions


@pytest.mark.parametrize("size", CELLS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_fine_tuning_config_says_what_it_learns_from_and_where_it_goes(size: str, split: str) -> None:
    config = parsed_config(*layers(size, split)).config.fit
    data, trainer = config.data.init_args, config.trainer
    train = {"100h": ["train-clean-100"], "960h": ["train-clean-100", "train-clean-360", "train-other-500"]}
    assert [str(path) for path in data.train] == [f"manifests/{of}.jsonl.gz" for of in train.get(split, [split])]
    assert [str(path) for path in data.validation] == ["manifests/dev-other.jsonl.gz"]
    encoder = "base/iteration2" if size == "base" else f"{size}/iteration1"
    assert str(config.model.init_args.pretrained) == f"checkpoints/{encoder}/last.ckpt"
    assert config.output == f"checkpoints/{size}-{split}"
    logger = trainer.logger.init_args
    assert (logger.project, logger.group, logger.name) == ("hubert_lightning", size, f"{size}-{split}")
    assert len(trainer.callbacks) == 1  # the layers leave it alone

    # On several GPUs: DDP looks for parameters without gradients if, and only if, there will be some
    frozen = config.model.init_args.freeze_steps > 0
    assert trainer.strategy == ("ddp_find_unused_parameters_true" if frozen else "auto")
    steps, rest = divmod(trainer.val_check_interval, trainer.accumulate_grad_batches)
    assert not rest  # validated after a step
    assert trainer.max_steps / steps >= 13


@pytest.mark.parametrize(
    "path", [*PRETRAINING_CONFIGS, *FINETUNING_CONFIGS, *LARGER, *SIZES, *SCRATCH], ids=config_name
)
def test_a_config_opens_with_what_it_reproduces(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("path", PRETRAINING_CONFIGS, ids=config_name)
def test_a_pre_training_config_takes_real_steps(path: Path, manifests: Path, tmp_path: Path) -> None:
    has_noise = "noise:" in path.read_text()
    main(
        ["fit", "--config", str(path), "--config", str(ROOT / "tests/smoke.yaml")]
        + [f"--output={tmp_path}"]
        + [f"--data.init_args.train=[{manifests / 'train.jsonl.gz'}]"]
        + [f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]"]
        + [f"--data.init_args.mixing.noise=[{manifests / 'test.jsonl.gz'}]"] * has_noise
    )
    metrics = json.loads((tmp_path / "iteration1" / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert math.isfinite(metrics["val/loss"])
    assert (tmp_path / "iteration1" / "last.ckpt").exists()
    assert_runs_alone(tmp_path / "iteration1" / "config.yaml")


@pytest.mark.parametrize(
    "configs",
    [
        *([f"--config={path}"] for path in FINETUNING_CONFIGS),
        # Of the larger sizes one split each; the others differ in numbers that are compared above
        layers("large", "100h"),
        layers("xlarge", "960h"),
    ],
    ids=lambda configs: "+".join(config_name(Path(config.removeprefix("--config="))) for config in configs),
)
def test_a_fine_tuning_config_takes_real_steps(configs: list[str], manifests: Path, tmp_path: Path) -> None:
    main(
        ["fit", *configs, "--config", str(ROOT / "tests/smoke-finetune.yaml")]
        + [f"--output={tmp_path}"]
        + [f"--data.init_args.train=[{manifests / 'finetune.jsonl.gz'}]"]
        + [f"--data.init_args.validation=[{manifests / 'dev.jsonl.gz'}]"]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert math.isfinite(metrics["val/loss"])
    assert (tmp_path / "best.ckpt").exists()
    assert_runs_alone(tmp_path / "config.yaml")
