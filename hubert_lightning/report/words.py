"""Numbers, names and settings in words, as a page shows them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hubert_lightning.report.json_files import Json, is_number
from hubert_lightning.report.run_files import Run

NAMES_OF_PLACES = ("folder", "output", "dirpath", "save_dir", "default_root_dir", "version", "iteration", "title")
"""Settings that name folders: they differ between all runs."""
MAX_VALUE = 160
"""Characters of a setting."""


def number(value: Json) -> str:
    """Write a number with four digits, in groups of three."""
    if isinstance(value, bool) or not is_number(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", " ")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.4g}"


def percent(rate: float, digits: int = 1) -> str:
    """Write a fraction in per cent."""
    return f"{100 * rate:.{digits}f} %"


def interval(low: float, high: float, digits: int = 1) -> str:
    """Write a confidence interval in per cent; a dash where it is unknown."""
    if math.isnan(low):
        return "–"
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %".replace("-", "−")  # a difference may be negative


def duration(seconds: float) -> str:
    """Write a duration in the two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} days {hours} h"


def hours(value: float) -> str:
    """Write an amount of audio."""
    if value >= 1:
        return f"{number(round(value, 1 if value >= 10 else 2))} h"
    return f"{60 * value:.0f} min" if value >= 0.1 else f"{60 * value:.1f} min"


def listing(words: Sequence[str]) -> str:
    """Join words: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: float, one: str, several: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{number(count)} {one if count == 1 else several or one + 's'}"


def setting(value: Json) -> str:
    """Write the value of a setting; of each path, the last two parts, which name nobody's home folder."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        return ", ".join(map(setting, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting(inner)}" for name, inner in value.items()) or "–"
    text = ", ".join(map(short_path, str(value).split(", ")))  # the record joins lists so
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 1]}…"


def short_path(text: str) -> str:
    """Return the last two parts of an absolute path; other texts as they are."""
    parts = re.split(r"[\\/]+", text.rstrip("\\/"))
    absolute = text.startswith(("/", "~")) or re.match(r"[A-Za-z]:[\\/]", text)
    return "/".join(parts[-2:]) if absolute and len(parts) > 2 else text


def short_paths(text: str, folders: Iterable[Path]) -> str:
    """Shorten the paths in a sentence as `short_path` does, so that a page names nobody's home folder.

    Args:
        text: Sentence.
        folders: Folders whose paths are removed whatever characters they have.
    """
    for folder in sorted(map(str, folders), key=len, reverse=True):
        text = text.replace(f"{folder}/", "") if folder != "/" else text
    return re.sub(r"(?<![\w.~/-])[~/][^\s:;,'\"()]+", lambda path: short_path(path[0]), text)


def is_place(name: str) -> bool:
    """Whether a setting names a folder of the run itself."""
    return name in NAMES_OF_PLACES or name.rpartition("/")[2] in NAMES_OF_PLACES or "logger/" in name


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name files by as few of their last parts as tell them apart."""
    length = 1
    resolved = [path.absolute() for path in paths]
    while length < max(len(path.parts) for path in resolved):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
        length += 1
    return [str(path) for path in resolved]


def shares(record: Mapping[str, Json], thing: str) -> str:
    """Hours of each language or corpus of the training data, and its share of an epoch; empty if they are not recorded.

    Args:
        record: Record of a run.
        thing: "languages" or "corpora".
    """
    start = f"data/train/{thing}/"
    names = [key.removeprefix(start).removesuffix("/hours") for key in record if re.fullmatch(f"{start}.+/hours", key)]
    parts = []
    for name in names:
        amount, share = (record.get(f"{start}{name}/{value}") for value in ("hours", "share"))
        if is_number(amount):
            parts.append(f"{name} {hours(amount)}" + (f" ({percent(share)} of an epoch)" if is_number(share) else ""))
    return ", ".join(parts)


def facts(run: Run) -> dict[str, str]:
    """What a run trained on what, by the names of a table's rows; unknown facts are left out."""
    record, rows = run.record, dict[str, str]()

    def first(*names: str) -> Json:
        return next((record[name] for name in names if record.get(name) is not None), None)

    rows["task"] = {"pre-training": "pre-training (masked prediction)", "fine-tuning": "fine-tuning (CTC)"}.get(
        run.task, "–"
    )
    rows["state"] = state(run)
    audio = []
    if is_number(amount := first("data/train/hours")):
        audio.append(hours(amount))
    for name, noun in (("speakers", "speaker"), ("utterances", "utterance")):
        if is_number(count := first(f"data/train/{name}")) and count:
            audio.append(counted(count, noun))
    rows["training data"] = ", ".join(audio)
    for thing in ("languages", "corpora"):
        rows[thing] = shares(record, thing)
    rows["manifests"] = setting(first("data/train/manifests") or [])
    rows["validation data"] = setting(first("data/validation/manifests") or [])
    if run.task == "pre-training":
        rows["targets"] = targets(run)
        if is_number(inertia := first("labels/kmeans_inertia")):
            rows["K-means inertia"] = number(inertia)
        if is_number(pnmi := first("labels/pnmi")):
            rows["PNMI of the targets"] = f"{pnmi:.3f}"
    rows["initial weights"] = setting(first("pretrained")) if first("pretrained") else "random"
    if continued := first("labels/continues"):
        rows["initial weights"] = f"continued from {short_path(str(continued))}"
    rows["encoder"] = encoder(record)
    if is_number(parameters := first("parameters")):
        rows["parameters"] = f"{parameters / 1e6:.3g} million"
    if is_number(rate := first("optimizer/lr")):
        rows["optimizer"] = f"{first('optimizer/class') or 'optimizer'}, peak learning rate {rate:g}"
    if is_number(warmup := first("schedule/warmup_steps", "warmup_steps")):
        rows["warm-up"] = counted(warmup, "step")
    if is_number(seconds := first("batch/global_seconds", "batch/seconds", "batch/max_duration")):
        rows["batch"] = f"up to {number(seconds)} s of audio a step"
    if is_number(probability := first("masks/mask_prob", "data/mask_prob")):
        length = first("masks/mask_length", "data/mask_length")
        rows["masks"] = (
            f"spans of {number(length)} frames over {percent(probability, 0)} of the frames, if they did not overlap"
        )
    if mixed := _mixing(record):
        rows["mixing"] = mixed
    rows["precision"] = setting(first("precision"))
    if is_number(size := first("world_size")):
        device = first("device") or str(first("accelerator") or "").removesuffix("Accelerator")
        rows["devices"] = f"{number(size)} × {device}" if device else number(size)
    rows["seed"] = setting(first("seed", "data/seed"))
    rows["version"] = setting(first("version"))
    return {name: value for name, value in rows.items() if value not in ("", "–")}


def _mixing(record: Mapping[str, Json]) -> str:
    """Write what is mixed into the training audio; empty if nothing is."""
    probability, share = record.get("data/mixing/probability"), record.get("data/mixing/noise_share")
    parts = []
    if is_number(probability) and probability > 0:
        noise = record.get("data/mixing/noise")
        what = f"other speech or, in {percent(share, 0)}, noise" if noise and is_number(share) else "other speech"
        parts.append(f"{what} in {percent(probability, 0)} of the utterances")
    if (rooms := record.get("data/mixing/room_probability")) and is_number(rooms) and record.get("data/mixing/rooms"):
        parts.append(f"rooms in {percent(rooms, 0)}")
    return "; ".join(parts)


def state(run: Run) -> str:
    """Write how far a run has come."""
    total = run.total_steps
    steps = (
        f"{number(run.step)} of {counted(total, 'step')}" if total and total >= run.step else counted(run.step, "step")
    )
    return {
        "finished": f"finished, {steps}",
        "training": f"still training, {steps}",
        "interrupted": f"not finished, {steps}",
    }[run.status]


def targets(run: Run) -> str:
    """Write what a pre-training predicts."""
    clusters, features, layer = (run.record.get(f"labels/{name}") for name in ("clusters", "features", "layer"))
    if not clusters and not features:
        return ""
    amount = setting(clusters) if clusters else "some"
    if features == "mfcc":
        return f"{amount} clusters of MFCCs"
    if layer and features:
        models = " and ".join(short_path(name) for name in str(features).split(", "))
        several = "s" if "," in str(layer) else ""
        residual = " and of their residuals" if run.record.get("labels/residual") else ""
        return f"{amount} clusters of layer{several} {layer} of {models}{residual}"
    return f"{amount} clusters of {setting(features)}" if features else f"{amount} clusters"


def encoder(record: dict[str, Json]) -> str:
    """Write the size of the encoder."""
    layers, dim, heads = (record.get(f"encoder/{name}") for name in ("num_layers", "dim", "num_heads"))
    if not is_number(layers) or not is_number(dim):
        return ""
    return f"{counted(layers, 'layer')} of {number(dim)}" + (f", {counted(heads, 'head')}" if is_number(heads) else "")
