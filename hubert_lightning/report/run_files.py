"""Runs as a report reads them: from the files in their folders, some of which may be missing or corrupt.

Nothing in a folder is changed, and neither Lightning nor a checkpoint is loaded. A corrupt file counts as missing, and
the page names it.
"""

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from hubert_lightning.asr.results import origin_columns
from hubert_lightning.errors import UserError
from hubert_lightning.files import read_regular
from hubert_lightning.report.json_files import LARGEST_FILE, Json, checked, flat, is_number, json_object, natural
from hubert_lightning.training.run_lock import holder_of
from hubert_lightning.training.watched import LAYERS, WATCHED, read_layers
from hubert_lightning.untrusted.yaml_file import read_yaml

Curve = list[tuple[int, float]]
"""Optimizer steps, counted from 1, and the values after them."""
Task = Literal["pre-training", "fine-tuning", "run"]
Status = Literal["finished", "training", "interrupted"]

MAX_DEPTH = 4
"""Folders below a given one in which runs are searched."""
NOT_RUNS = ("labels", "test", "predict", "wandb", "watched", "media", "LibriSpeech", "manifests")
"""Names of folders that hold parts of runs, or audio."""
SIGNS = ("config.yaml", "metrics.json", "record.json", "test.jsonl", "metrics.csv")
"""Files of which a run's folder has at least one."""
OF_RUN, BEHIND_LABELS, MEASURED = "this model", "the model behind its labels", "hubert quality"
"""Models whose layers were judged: while the run trained, to choose the layer of its labels, and by hand."""
EARLIER_NAMES = {
    "train/audio_seconds_per_second": "speed/audio_seconds_per_second",
    "train/data_wait": "speed/data_wait",
    "train/mfu": "speed/mfu",
    "train/waste": "speed/waste",
    "val/label_perplexity": "units/label_perplexity",
    "val/predicted_perplexity": "units/predicted_perplexity",
    "val/label_clusters": "units/label_clusters",
    "val/predicted_clusters": "units/predicted_clusters",
}
"""Metrics of runs that an earlier version trained, and their names today."""


@dataclass(frozen=True)
class Results:
    """Results of one test set, decoder and checkpoint.

    Args:
        path: JSON lines of `hubert test`.
        name: Name of the set's folder; "test" for results beside the run's other files.
        origin: Checkpoint, manifest, decoder, step and version that the rows state.
    """

    path: Path
    name: str
    origin: dict[str, Json]

    @classmethod
    def of(cls, path: Path, name: str = "test") -> "Results":
        """Read the origin of a file of results."""
        origin: dict[str, Json] = {}
        with suppress(UserError, OSError):
            origin = origin_columns(path)
        return cls(path, name, origin)

    @property
    def manifest(self) -> str:
        """File names of the manifests, without their folders and suffixes."""
        names = [re.split(r"[\\/]", path)[-1] for path in str(self.origin.get("manifest") or "").split(", ")]
        return ", ".join(re.sub(r"\.(jsonl|json)(\.gz)?$", "", name) for name in names) or self.name

    @property
    def decoder(self) -> str:
        """How the hypotheses were found: "greedy", or the name of a settings file."""
        return re.split(r"[\\/]", str(self.origin.get("decoder") or "greedy"))[-1].removesuffix(".json")


@dataclass(frozen=True)
class Tuning:
    """Trials of `hubert tune-decoder`.

    Args:
        path: File of the trials.
        content: Its content: rates of greedy decoding, of the default weights and of each trial.
    """

    path: Path
    content: dict[str, Json]


@dataclass(frozen=True)
class Run:
    """A run: the fit of one iteration or of one fine-tuning.

    Args:
        folder: Folder of the run.
        name: Name on the page, unique among the runs of the page.
        task: What it trains.
        status: Whether the fit has ended.
        record: Settings as they were built, by flat names such as "encoder/num_layers".
        curves: Values of each metric.
        final: Values at the end of the fit, empty before.
        layers: Quality of each layer's clusters: title and measures of each layer, counted from 1.
        results: Results of tests.
        tunings: Trials of decoders.
        problems: Files that cannot be read, one sentence each.
    """

    folder: Path
    name: str
    task: Task
    status: Status
    record: dict[str, Json]
    curves: dict[str, Curve]
    final: dict[str, float]
    layers: dict[str, list[dict[str, Json]]] = field(default_factory=dict)
    results: list[Results] = field(default_factory=list)
    tunings: list[Tuning] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def last(self, metric: str) -> float | None:
        """Return the value of a metric at the end of the run, or the newest one; None if there is none."""
        if metric in self.final:
            return self.final[metric]
        curve = self.curves.get(metric)
        return curve[-1][1] if curve else None

    def best(self, metric: str, highest: bool = False) -> tuple[int, float] | None:
        """Return the best value of a metric with its step; None if there is none."""
        values = self.curves.get(metric) or ([(self.step, self.final[metric])] if metric in self.final else [])
        return (max if highest else min)(values, key=lambda point: point[1], default=None)

    @property
    def step(self) -> int:
        """Optimizer steps so far."""
        steps = [curve[-1][0] for name, curve in self.curves.items() if curve and not name.startswith("labels/")]
        return int(self.final.get("steps") or max(steps, default=0))

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, if they are known."""
        for name in ("schedule/total_steps", "max_steps"):
            if is_number(total := self.record.get(name)) and total > 0:
                return int(total)
        return None


def find_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs in folders.

    Args:
        folders: Folders of runs, or folders that hold such folders: a pre-training with its iterations, a demo.

    Returns:
        The runs in the order in which the method needs them: pre-training before fine-tuning, iterations by number.

    Raises:
        UserError: A folder does not exist, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            kind = "a file" if folder.is_file() else "no such folder"
            raise UserError(f"{folder}: {kind}; give the folder of a run, which `hubert fit --output` named")
        inside = dict.fromkeys(path.resolve() for path in _run_folders(folder, MAX_DEPTH))
        if not inside:
            raise UserError(
                f"{folder}: holds no run (no {', '.join(SIGNS[:3])} or {SIGNS[3]} up to {MAX_DEPTH} folders below); "
                "give a folder that `hubert fit --output` named"
            )
        found |= inside
    runs = [read_run(folder, name) for folder, name in zip(found, short_names([*found]), strict=True)]
    order: list[Task] = ["pre-training", "run", "fine-tuning"]
    return sorted(runs, key=lambda run: order.index(run.task))


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in SIGNS):
        yield folder
    if not depth:
        return
    try:
        inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: natural(path.name))
    except OSError:
        return
    for path in inside:
        if not path.name.startswith((".", "version_")) and path.name not in NOT_RUNS and not path.is_symlink():
            yield from _run_folders(path, depth - 1)


def short_names(folders: Sequence[Path]) -> list[str]:
    """Name folders by their last parts, as many as tell them apart; an iteration also by the folder around it."""

    def name(folder: Path, length: int) -> str:
        return "/".join(folder.parts[-length:])

    lengths = [2 if re.fullmatch(r"(iteration|version_)\d+", folder.name) else 1 for folder in folders]
    while True:
        names = [name(folder, length) for folder, length in zip(folders, lengths, strict=True)]
        longer = [
            length + (names.count(own) > 1 and length < len(folder.parts))
            for own, folder, length in zip(names, folders, lengths, strict=True)
        ]
        if longer == lengths:
            return names
        lengths = longer


def read_run(folder: Path, name: str) -> Run:
    """Read what the folder of a run holds.

    Args:
        folder: Folder of the run.
        name: Name on the page.
    """
    problems: list[str] = []
    record, config = _read_record(folder, problems), _read_config(folder, problems)
    settings = {**_config_record(config), **record}
    final = {key: value for key, value in json_object(folder / "metrics.json", problems).items() if is_number(value)}
    curves = _renamed(_read_curves(folder, problems))
    curves = _with_coverage(curves, settings.get("labels/clusters"))
    final = {name: curve[0][1] for name, curve in _renamed({name: [(0, v)] for name, v in final.items()}).items()}
    return Run(
        folder=folder,
        name=name,
        task=_task(settings, {*curves, *final}),
        status=_status(folder, finished=bool(final)),
        record=settings,
        curves=curves,
        final=final,
        layers=_read_layers(folder, curves, problems),
        results=(results := find_results(folder)),
        tunings=find_tunings(folder, results),
        problems=problems,
    )


def _task(settings: Mapping[str, Json], metrics: Iterable[str]) -> Task:
    stated = str(settings.get("task") or "")
    names = set(metrics)
    if "Pretraining" in stated or "train/masked_loss" in names or "val/masked_loss" in names:
        return "pre-training"
    if "Finetuning" in stated or "val/wer" in names:
        return "fine-tuning"
    return "run"


def _status(folder: Path, finished: bool) -> Status:
    if finished:
        return "finished"
    with suppress(UserError, OSError):
        if holder_of(folder) or holder_of(folder.parent):
            return "training"
    return "interrupted"


def _read_record(folder: Path, problems: list[str]) -> dict[str, Json]:
    """Read record.json; of a run that has none, the newest hparams.yaml under today's names."""
    if record := json_object(folder / "record.json", problems):
        return flat(record)
    older = [*folder.glob("hparams.yaml"), *folder.glob("version_*/hparams.yaml")]
    for path in sorted(older, key=lambda path: natural(str(path)), reverse=True):
        content = checked(path, problems, lambda path: read_yaml(path))
        if isinstance(content, dict) and content:
            return {_todays_name(name): value for name, value in flat(content).items()}
    return {}


def _todays_name(name: str) -> str:
    for before, after in (
        ("model/", ""),
        ("trainer/", ""),
        ("labels/recipe/", "labels/"),
        ("batch/global_max_duration", "batch/global_seconds"),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _read_config(folder: Path, problems: list[str]) -> dict[str, Json]:
    content = checked(folder / "config.yaml", problems, lambda path: read_yaml(path))
    return content if isinstance(content, dict) else {}


def _config_record(config: Mapping[str, Json]) -> dict[str, Json]:
    """Settings that the resolved config states, under the names of the record."""
    record: dict[str, Json] = {}

    def part(*keys: str) -> dict[str, Json]:
        content: Json = config
        for key in keys:
            content = content.get(key) if isinstance(content, dict) else None
        return content if isinstance(content, dict) else {}

    model, data, trainer = part("model", "init_args"), part("data", "init_args"), part("trainer")
    if class_path := part("model").get("class_path"):
        record["task"] = str(class_path).rpartition(".")[2]
    record |= flat({name: value for name, value in model.items() if name not in ("optimizer", "vocabulary")})
    optimizer = part("model", "init_args", "optimizer")
    if optimizer:
        record["optimizer/class"] = str(optimizer.get("class_path")).rpartition(".")[2]
        record |= flat(optimizer.get("init_args") or {}, "optimizer/")
    for key, name in (("train", "data/train/manifests"), ("validation", "data/validation/manifests")):
        if data.get(key):
            record[name] = data[key]
    record |= {
        f"data/{key}": data[key] for key in ("mask_prob", "mask_length", "max_crop", "min_duration") if key in data
    }
    if isinstance(mixing := data.get("mixing"), dict):
        record |= flat(mixing, "data/mixing/")
    if is_number(data.get("max_duration")):
        record["batch/max_duration"] = data["max_duration"]
    for key in ("precision", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "devices", "num_nodes"):
        if trainer.get(key) is not None:
            record[key] = trainer[key]
    if config.get("seed_everything") is not None:
        record["seed"] = config["seed_everything"]
    callbacks = trainer.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(callback, dict) and str(callback.get("class_path")).endswith("Relabel"):
            record |= flat(callback.get("init_args") or {}, "labels/")
    return record


def _read_curves(folder: Path, problems: list[str]) -> dict[str, Curve]:
    """Read the tables of all starts of a run; a later start replaces what an earlier one logged after its start.

    The table in the folder itself comes last: it has all starts, those of `version_0` and the like one start each.
    """
    tables = [*folder.glob("metrics.csv"), *folder.glob("version_*/metrics.csv")]
    curves: dict[str, Curve] = {}
    for path in sorted(tables, key=lambda path: (path.parent == folder, natural(str(path)))):
        for name, curve in (checked(path, problems, _read_table) or {}).items():
            kept = [point for point in curves.get(name, []) if point[0] < curve[0][0]]
            curves[name] = kept + curve
    return curves


def _read_table(path: Path) -> dict[str, Curve]:
    content = read_regular(path, LARGEST_FILE).decode(errors="replace")
    values: dict[str, dict[int, float]] = {}
    for row in csv.DictReader(content.splitlines()):
        step = row.get("step") or ""
        if not (step.isascii() and step.isdecimal()):
            continue
        for name, text in row.items():
            if name and text and "/" in name:
                with suppress(ValueError):
                    value = float(text)
                    if math.isfinite(value):
                        values.setdefault(name, {})[int(step) + 1] = value
    return {name: sorted(points.items()) for name, points in values.items()}


def _renamed(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {EARLIER_NAMES.get(name, name): curve for name, curve in curves.items()}


def _with_coverage(curves: dict[str, Curve], clusters: Json) -> dict[str, Curve]:
    """Turn the earlier counts of clusters in use into shares of all clusters."""
    total = sum(clusters) if isinstance(clusters, list) and all(map(is_number, clusters)) else clusters
    if is_number(total) and total > 0:
        for kind in ("label", "predicted"):
            if counts := curves.get(f"units/{kind}_clusters"):
                curves.setdefault(f"units/{kind}_coverage", [(step, count / total) for step, count in counts])
    return curves


def _read_layers(folder: Path, curves: Mapping[str, Curve], problems: list[str]) -> dict[str, list[dict[str, Json]]]:
    """Read the quality of layers: of this model in training, of the model behind its labels, of `hubert quality`."""
    rows_by_model: dict[str, list[dict[str, Json]]] = {}
    if validations := checked(folder / WATCHED / LAYERS, problems, lambda _: read_layers(folder)):
        rows_by_model[OF_RUN] = [asdict(layer) for layer in validations[-1].layers]
    else:
        logged: dict[int, dict[str, Json]] = {}
        for name, curve in curves.items():
            if match := re.fullmatch(r"val/layer(\d+)_(\w+)", name):
                logged.setdefault(int(match[1]), {"layer": int(match[1])})[match[2]] = curve[-1][1]
        if logged:
            rows_by_model[OF_RUN] = [logged[number] for number in sorted(logged)]
    for title, path in (
        (BEHIND_LABELS, folder / "layers.json"),
        (MEASURED, folder / "quality.json"),
        (MEASURED, folder / "quality" / "quality.json"),
    ):
        rows = []
        for name, measures in json_object(path, problems).items():
            if isinstance(measures, dict) and (match := re.fullmatch(r"layer (\d+)|mfcc", name)):
                rows.append({**measures, "layer": int(match[1] or 0)})
        if rows:
            rows_by_model[title] = sorted(rows, key=lambda row: row["layer"])
    return rows_by_model


def find_results(folder: Path) -> list[Results]:
    """Find the results of tests in the folder of a run: each set's own, or else those beside the run's files."""
    paths = sorted(folder.glob("test/*/test.jsonl"), key=lambda path: natural(path.parent.name))
    own = [Results.of(path, path.parent.name) for path in paths if path.is_file()]
    beside = folder / "test.jsonl"
    if beside.is_file():
        results = Results.of(beside, folder.name)
        if not any(results.origin == other.origin for other in own):
            own.append(results)
    return own


def find_tunings(folder: Path, results: Sequence[Results]) -> list[Tuning]:
    """Find the trials of `hubert tune-decoder`: in the folder of a run, and beside the settings that tests used."""
    paths = {*folder.glob("*.trials.json"), *folder.glob("*/*.trials.json")}
    for one in results:
        decoder = one.origin.get("decoder")
        if isinstance(decoder, str) and decoder.endswith(".json"):
            paths.add(Path(decoder).with_suffix(".trials.json"))
    tunings = {}
    for path in sorted(paths):
        content = json_object(path, [])
        if isinstance(content.get("trials"), list):
            tunings[path.resolve()] = Tuning(path, content)
    return [*tunings.values()]
