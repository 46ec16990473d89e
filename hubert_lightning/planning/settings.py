"""Sizes, batches, steps and labels of a config of `hubert fit`, read without importing the classes that it names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hubert_lightning.errors import UserError
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.packaged_configs import configs_folder
from hubert_lightning.planning.keys import check_keys, with_settings
from hubert_lightning.planning.workload import Workload, masked_fraction
from hubert_lightning.untrusted.yaml_file import read_yaml

MOST_CLUSTERS = 500
"""The most clusters that `clusters: auto` chooses (units/label_recipe.py)."""
KNOWN_HOURS = {
    "train-clean-100": 100.6,
    "train-clean-360": 363.6,
    "train-other-500": 496.9,
    "train-10h": 10.0,
    "train-1h": 1.0,
    "train-10min": 1 / 6,
    "librilight": 57_706.4,
}
"""Hours of the manifests that `hubert prepare librispeech` and the recipes name."""
GPUS_OF_RECIPES = 8
"""GPUs of a config that leaves `trainer.devices` to the machine."""
CROP, PADDED = 15.625, 13.0
"""Seconds of a row: the longest crop of pre-training, 250 k samples, and a mean utterance of fine-tuning."""
SHORTEST = 0.025
"""Seconds of a frame."""
PUBLISHED = {
    "facebook/hubert-base-ls960": "base",
    "facebook/hubert-large-ll60k": "large",
    "facebook/hubert-large-ls960-ft": "large",
    "facebook/hubert-xlarge-ll60k": "xlarge",
    "facebook/hubert-xlarge-ls960-ft": "xlarge",
    "microsoft/wavlm-base": "wavlm-base",
    "microsoft/wavlm-base-plus": "wavlm-base-plus",
}
"""Recipes in `configs/pretrain` that have the size of a published model."""


@dataclass(frozen=True)
class Labels:
    """The labels of an iteration.

    Args:
        encoder: Model whose layer is clustered; None for MFCCs.
        layer: Its layer, the last one of several.
        clusters: K-means clusters of each stream.
        max_frames: Frames that K-means is fitted on.
        others: Further models whose layers are clustered, and their layers, likewise.
    """

    encoder: EncoderConfig | None
    layer: int
    clusters: tuple[int, ...]
    max_frames: int
    others: tuple[tuple[EncoderConfig | None, int], ...] = ()

    @property
    def teachers(self) -> tuple[tuple[EncoderConfig | None, int], ...]:
        """All models, None for MFCCs, and their layers."""
        return ((self.encoder, self.layer), *self.others)


@dataclass(frozen=True)
class Stage:
    """One training: an iteration, or a fine-tuning.

    Args:
        name: Its name.
        workload: Model in training.
        steps: Optimizer steps.
        batch_seconds: Audio of a batch of one GPU.
        accumulated: Batches of a step.
        gpus: GPUs of the config.
        row_seconds: Audio of a row of a batch.
        sharded: Whether the config shards the model.
        compiled: Whether it compiles the model.
        labels: How its labels are made; None for transcripts or labels that exist.
        workers: Loader workers of each GPU.
    """

    name: str
    workload: Workload
    steps: int
    batch_seconds: float
    accumulated: int
    gpus: int
    row_seconds: float
    sharded: bool
    compiled: bool
    labels: Labels | None
    workers: int

    @property
    def step_seconds(self) -> float:
        """Audio of an optimizer step over all GPUs."""
        return self.batch_seconds * self.accumulated * self.gpus


def read_config(paths: Sequence[Path], settings: Sequence[str] = ()) -> dict[str, Any]:
    """Read configs as `hubert fit` does: a later one overrides an earlier one. What is null counts as not given.

    Args:
        paths: YAML files.
        settings: Keys of a command line, which override them, such as "trainer.devices=2".

    Raises:
        UserError: One is missing, or no config of `hubert fit`, or has a key that `hubert fit` does not know.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            known = ", ".join(sorted(_known_configs()))
            raise UserError(f"{path}: there is no such config; give a path, or one of this package: {known}")
        content = read_yaml(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a config of `hubert fit`; give one with model, data and trainer")
        merged = _merged(merged, content)
    merged = with_settings(merged, settings)
    missing = [key for key in ("model", "data", "trainer") if not isinstance(merged.get(key), dict)]
    if not missing and not merged["model"].get("class_path"):
        missing = ["model.class_path"]
    if missing:
        layers = "; give the config that it is a layer over first" if len(paths) == 1 else ""
        raise UserError(f"{', '.join(map(str, paths))}: has no {missing[0]}, as a config of `hubert fit` has{layers}")
    for key in ("model", "data"):
        if not isinstance(merged[key].get("init_args", {}), dict):
            raise UserError(f"{key}.init_args is {merged[key]['init_args']!r:.40}; give names and values")
    check_keys(merged)
    return {key: _given(value) for key, value in merged.items()}


def stages_of(config: Mapping[str, Any]) -> list[Stage]:
    """Return the trainings that a config describes.

    Args:
        config: What `read_config` returned.

    Raises:
        UserError: A value cannot be planned.
    """
    if "CTC" in str(config["model"].get("class_path", "")):
        return [_finetuning(config)]
    iterations = config.get("iterations") or [None]
    if not isinstance(iterations, list) or not all(isinstance(one, dict | None) for one in iterations):
        raise UserError(f"iterations is {iterations!r:.60}; give a list such as [{{features: mfcc, clusters: 100}}]")
    parts = [
        (f"iterations.{number}", part)
        for number, iteration in enumerate(iterations, start=1)
        for part in _parts(iteration, f"iterations.{number}")
    ]
    return [_iteration(config, part, place, number) for number, (place, part) in enumerate(parts, start=1)]


def _parts(iteration: Mapping[str, Any] | None, place: str) -> list[Mapping[str, Any] | None]:
    """Split an iteration that is labelled several times, as `hubert fit` does."""
    if not iteration or iteration.get("relabel_every") is None:
        return [iteration]
    every = int(_number(iteration, "relabel_every", 1, place, 1))
    steps = int(_number(iteration, "max_steps", 250_000, place, 1))
    return [{**iteration, "max_steps": min(every, steps - start)} for start in range(0, steps, every)]


def audio_hours(config: Mapping[str, Any]) -> float | None:
    """Hours of the training manifests, if their names are known ones."""
    train = (config["data"].get("init_args") or {}).get("train")
    paths = train if isinstance(train, list) else [train] if train else []
    names = [Path(str(path)).name.partition(".")[0] for path in paths]
    known = len(set(names)) == len(names) and set(names) <= set(KNOWN_HOURS)
    return sum(KNOWN_HOURS[name] for name in names) if names and known else None


def _iteration(config: Mapping[str, Any], iteration: Mapping[str, Any] | None, place: str, number: int) -> Stage:
    model, data = config["model"].get("init_args") or {}, config["data"].get("init_args") or {}
    encoder = _encoder(model.get("encoder") or {})
    place, key = (place, "clusters") if iteration else ("model.init_args", "num_clusters")
    given = (iteration or model).get(key, 100)
    given = MOST_CLUSTERS if given == "auto" else given  # of those that it chooses from
    listed = given if isinstance(given, list) and given else [given]
    clusters = tuple(int(_number({key: one}, key, 100, place, 1)) for one in listed)
    labels = None
    if iteration:
        (first, *others), streams = _teachers(iteration, encoder, place)
        residual = int(_number(iteration, "residual", 1, place, 1))
        clusters = clusters * len(iteration.get("parts") or [1]) * streams * residual
        max_frames = int(_number(iteration, "max_frames", 17_280_000, place, 1))
        labels = Labels(*first, clusters, max_frames, tuple(others))
    masked = _number(model, "masked_weight", 1.0, "model.init_args", 0)
    heads = clusters * (1 + len(model.get("intermediate_layers") or []))
    workload = Workload(
        encoder, heads, int(_number(model, "final_dim", 256, "model.init_args", 1)),
        predicted=masked_fraction(_number(data, "mask_prob", 0.8, "data.init_args", 0)) if masked == 1 else 1.0,
        activation_checkpointing=bool(model.get("activation_checkpointing", False)),
    )  # fmt: skip
    steps = (iteration or config["trainer"]).get("max_steps", 250_000 if iteration else -1)
    name = f"iteration {number}" if iteration else "pre-training"
    crop = _number(data, "max_crop", CROP, "data.init_args", SHORTEST)
    return _stage(config, name, workload, steps, 87.5, min(CROP, crop), labels)


def _teachers(
    iteration: Mapping[str, Any], encoder: EncoderConfig, place: str
) -> tuple[list[tuple[EncoderConfig | None, int]], int]:
    """Models that an iteration's labels come from with their last layer that is clustered, and the number of layers.

    Raises:
        UserError: A model lacks a layer.
    """
    features, layers = iteration.get("features", "mfcc"), iteration.get("layer")
    names = features if isinstance(features, list) and features else [features] * _length(layers)
    layers = layers if isinstance(layers, list) and layers else [layers] * len(names)
    teachers: dict[str, tuple[EncoderConfig | None, int]] = {}
    for name, layer in zip(map(str, names), layers):
        model = None if name == "mfcc" else encoder if name == "previous" else encoder_of(Path(name))
        if model and isinstance(layer, int) and not 1 <= layer <= model.num_layers:
            raise UserError(f"{place}.layer is {layer}; the model has layers 1 to {model.num_layers}")
        last = layer if model and isinstance(layer, int) else model.num_layers if model else 0
        teachers[name] = model, max(last, teachers.get(name, (None, 0))[1])
    return list(teachers.values()), len(names)


def _length(layers: object) -> int:
    return max(len(layers), 1) if isinstance(layers, list) else 1


def _finetuning(config: Mapping[str, Any]) -> Stage:
    model = config["model"].get("init_args") or {}
    pretrained = model.get("pretrained")
    encoder = encoder_of(Path(str(pretrained))) if pretrained else _encoder(model.get("encoder") or {})
    frozen = model.get("freeze_convolutions", True)
    dropouts = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.1, "input_dropout": 0.0}
    changes: dict[str, Any] = {
        key: _number(model, key, default, "model.init_args", 0) for key, default in dropouts.items()
    }
    encoder = replace(encoder, **changes, feature_grad_mult=0.0 if frozen else 1.0)
    checkpointing = bool(model.get("activation_checkpointing", False))
    workload = Workload(encoder, (), tokens=29, predicted=1.0, activation_checkpointing=checkpointing)
    steps = config["trainer"].get("max_steps", -1)
    return _stage(config, "fine-tuning", workload, steps, 200.0, PADDED, None)


def _stage(
    config: Mapping[str, Any], name: str, workload: Workload, steps: int, default: float, row: float,
    labels: Labels | None,
) -> Stage:  # fmt: skip
    model, data, trainer = (
        config["model"].get("init_args") or {},
        config["data"].get("init_args") or {},
        config["trainer"],
    )
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"trainer.max_steps is {steps}; a plan needs the number of steps, set it")
    if str(trainer.get("precision", "bf16-mixed")) not in ("bf16-mixed", "16-mixed"):
        raise UserError(f"trainer.precision is {trainer['precision']}; only bf16-mixed can be planned, set it")
    seconds = default  # "auto": as large as fits, which the plan shows
    if data.get("max_duration") != "auto":
        seconds = _number(data, "max_duration", default, "data.init_args", SHORTEST)
    devices = trainer.get("devices", "auto")
    devices = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdecimal() else 0
    gpus = devices * int(_number(trainer, "num_nodes", 1, "trainer", 1)) or GPUS_OF_RECIPES
    strategy = trainer.get("strategy", "auto")
    strategy = strategy.get("class_path", "") if isinstance(strategy, dict) else str(strategy)
    return Stage(
        name, workload, steps, seconds, int(_number(trainer, "accumulate_grad_batches", 1, "trainer", 1)), gpus,
        min(row, seconds), "FSDP" in strategy, bool(model.get("compile", False)), labels,
        int(_number(data, "num_workers", 4, "data.init_args", 0)),
    )  # fmt: skip


def encoder_of(checkpoint: Path) -> EncoderConfig:
    """Return the encoder of a checkpoint that need not exist yet: from its run's config, or the recipe that makes it.

    Raises:
        UserError: Neither is known.
    """
    for folder in checkpoint.parents:
        config = folder / "config.yaml"
        if config.is_file():
            return _encoder((read_yaml(config).get("model", {}).get("init_args") or {}).get("encoder") or {})
    size = PUBLISHED.get(str(checkpoint))
    for path in [*sorted(configs_folder().glob("pretrain/*.yaml")), configs_folder() / "demo.yaml"]:
        content = read_yaml(path)
        if path.stem == size or (content.get("output") and Path(content["output"]) in checkpoint.parents):
            return _encoder((content["model"].get("init_args") or {}).get("encoder") or {})
    raise UserError(
        f"{checkpoint}: no config of its run is beside it and no recipe makes it, so its size is unknown; plan with a "
        f"model of the same size, such as {' or '.join(list(PUBLISHED)[:2])}"
    )


def _encoder(values: object) -> EncoderConfig:
    place = "model.init_args.encoder"
    if not isinstance(values, dict):
        raise UserError(f"{place} is {values!r:.40}; give names and values, such as {{dim: 768, num_layers: 12}}")
    known = {field.name for field in fields(EncoderConfig)}
    if unknown := sorted(set(values) - known):
        raise UserError(f"{place} has no {unknown[0]}; the keys are {', '.join(sorted(known))}")
    for field in fields(EncoderConfig):
        if type(field.default) in (int, float) and field.name in values:
            _number(values, field.name, 0, place, 0)
    return EncoderConfig(**values)


def _number(values: Mapping[str, Any], key: str, default: float, place: str, least: float) -> float:
    """Return a number of a config, or its default where it is not set.

    Raises:
        UserError: It is no finite number, or below the least one.
    """
    value = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise UserError(f"{place}.{key} is {value!r:.40}; a plan needs a number, at least {least:g}")
    return float(value)


def _given(value: Any) -> Any:  # Any: a value of a config
    """Leave out keys that are null: the config of a run states what nobody set."""
    if isinstance(value, list):
        return [_given(one) if isinstance(one, dict) else one for one in value]
    return {key: _given(one) for key, one in value.items() if one is not None} if isinstance(value, dict) else value


def _merged(first: dict[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _known_configs() -> list[str]:
    folder = configs_folder()
    return [
        str(path.relative_to(folder)) for kind in ("pretrain", "finetune") for path in folder.glob(f"{kind}/*.yaml")
    ]
