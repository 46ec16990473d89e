"""What a model says of itself to who finds it: how it came about, what it is worth, how it is used."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

import yaml

from hubert_lightning.files import read_regular
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.formats.own import read_checkpoint
from hubert_lightning.pretrained.weights import Trained
from hubert_lightning.untrusted.yaml_file import read_yaml

USE = {
    "transformers": """```python
from transformers import {processor}, {model}

model, processor = {model}.from_pretrained({name}), {processor}.from_pretrained({name})
```""",
    "torchaudio": """```python
import json

import torch
import torchaudio

folder = {name}
about = json.load(open(f"{{folder}}/model.json"))
model = getattr(torchaudio.models, about["function"].split(".")[-1])(**about["arguments"])
model.load_state_dict(torch.load(f"{{folder}}/model.pt", weights_only=True))
```

Where `normalize_waveform` is true in `model.json`, give each utterance zero mean and unit variance first.""",
    "fairseq": """```python
from fairseq import checkpoint_utils

folder = {name}
load = checkpoint_utils.load_model_ensemble_and_task
[model], _, _ = load([f"{{folder}}/checkpoint.pt"], arg_overrides={{"data": folder}})
```

fairseq as of September 2025 opens no fine-tuned HuBERT, whoever made it: its `hubert_asr.py` asks for `autoregressive`,
which its config lacks. s3prl opens what was not fine-tuned:
`S3PRLUpstream("hubert_local", path_or_url=f"{{folder}}/checkpoint.pt")`.
""",
    "safetensors": """```python
from hubert_lightning import load_encoder

encoder = load_encoder({name})
```""",
    "onnx": """```python
import numpy
import onnxruntime

folder = {name}
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
length = numpy.array([waveform.shape[1]])  # of (1, samples) float32, 400 or more
[output] = session.run(None, {{"waveform": waveform, "length": length}})
```

Batches may be of any size; where the encoder has a group norm, as Base, padding counts in it: give it utterances
one by one, or of one length.""",
}
"""Lines of Python for each format; `name` is the folder, as a literal."""


LARGEST = 10**6
"""Bytes of a config.yaml that a card is written of."""
ROWS, LONGEST = 100, 200
"""Rows of a table, and characters of one value, that a card shows."""


@dataclass(frozen=True)
class Facts:
    """What is known of the run that a checkpoint came from.

    steps:   that it was trained for, if it says so
    data:    names of the manifests that it was trained on, without their folders
    audio:   of the data that it was trained on: its utterances, hours and speakers, where the run has counted them
    metrics: of the validation that its run ended with, by name
    scores:  error rates of the last `hubert test` in its run, as `hubert score` writes them
    units:   of its labels: what was clustered, into how many
    quality: of its units, as `hubert quality` found it, by layer
    """

    steps: int | None = None
    data: tuple[str, ...] = ()
    audio: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For the file that holds the model."""
        return {"steps": self.steps, "data": list(self.data), **self.audio} if self.steps else {}


def run_facts(path: Path) -> Facts:
    """What lies beside a checkpoint of a run: config.yaml, metrics.json, scores.json, layers.json, quality.json."""
    if not path.is_file() or path.suffix != ".ckpt":
        return Facts()
    folder = path.parent
    config: Any = None
    # A card is written of what can be read; a date or a number in YAML may be none
    with suppress(yaml.YAMLError, OSError, ValueError, TypeError, RecursionError, OverflowError):
        config = read_yaml(folder / "config.yaml", LARGEST)
    data = _inside(config, "data", "init_args").get("train") or []
    data = [manifest for manifest in (data if isinstance(data, list) else [data]) if isinstance(manifest, str)]
    labels = next((_inside(one, "init_args") for one in _callbacks(config) if _is_relabel(one)), {})
    quality = _read(folder / "layers.json") or _read(folder / "quality.json") or _read(folder / "quality/quality.json")
    checkpoint = read_checkpoint(path)
    steps, metrics = checkpoint.get("global_step"), _read(folder / "metrics.json")
    if not _is_count(steps):
        steps = None
    if metrics.get("steps") != steps:  # of the end of the run, and not of this checkpoint
        metrics = {}
    validated = {name: value for name, value in metrics.items() if name.startswith("val/") and _is_number(value)}
    return Facts(
        steps or None,
        tuple(told(manifest) for manifest in data[:ROWS]),
        _counts(checkpoint),
        dict([*validated.items()][:ROWS]),
        _read(folder / "scores.json"),
        {name: told(labels[name]) for name in ("features", "layer", "clusters") if labels.get(name) is not None},
        quality,
    )


def model_card(name: str, trained: Trained, encoder: HubertEncoder, facts: Facts, format: str) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads."""
    fine_tuned = trained.head is not None
    task = "automatic-speech-recognition" if fine_tuned else "feature-extraction"
    library = {"transformers": "transformers", "onnx": "onnx"}.get(format, "hubert_lightning")
    model, processor = ("HubertForCTC", "AutoProcessor") if fine_tuned else ("HubertModel", "AutoFeatureExtractor")
    front = yaml.safe_dump(
        {"library_name": library, "pipeline_tag": task, "tags": ["hubert", "speech", "hubert_lightning"]},
        allow_unicode=True,
        sort_keys=False,
    )
    literal = f'"{name}"' if re.fullmatch(r"[\w .-]+", name, re.ASCII) else ascii(name)
    use = USE[format].format(name=literal, model=model, processor=processor)
    facts_of_it = _sentences(trained, encoder, facts)
    lines = ["---", front + "---", "", f"# {escaped(name)}", "", *facts_of_it, "", "## Use", "", use, ""]
    return "\n".join(lines)


def escaped(text: object) -> str:
    """A text as markdown that shows it as it is: in a cell of a table or a heading, without links, tags or code."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    shown = "".join(ENTITIES.get(character, character) for character in plain)
    return re.sub(r"\bwww\.", "www&#46;", re.sub(r"([\\*_\[\]~])", r"\\\1", shown), flags=re.IGNORECASE)


ENTITIES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",
    "`": "&#96;",
    "@": "&#64;",
    ":": "&#58;",
    "$": "&#36;",
}
"""What would begin a tag, a cell, code, an address or a formula."""


def name_of(path: object) -> str:
    """The last part of a path, of any system: what may be told of where a file lies."""
    return re.split(r"[\\/]+", str(path).rstrip("\\/"))[-1]


def told_source(source: Mapping[str, Any]) -> dict[str, Any]:
    """What a model says of where it comes from, for other people: paths of this machine are names of files."""
    return {told(name): told(value) for name, value in [*source.items()][:ROWS]}


def told(value: Any, depth: int = 0) -> Any:
    """What may be told of a value of a checkpoint or a config, whatever is in it.

    Args:
        value: Value to tell.
        depth: Lists and mappings that it is in.

    Returns:
        Of a path, the name of the file; of an address, what comes before a query; a number; the same of what lists and
        mappings hold, a hundred entries of each; None for all else.
    """
    if isinstance(value, str):
        return _public_address(value)[:LONGEST] if "://" in value else name_of(value)[:LONGEST]
    if value is None or isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) < 2**63):
        return value
    if depth < 5 and isinstance(value, Mapping):
        return {told(name, depth + 1): told(part, depth + 1) for name, part in [*value.items()][:ROWS] if _is_key(name)}
    if depth < 5 and isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [told(part, depth + 1) for part in value[:ROWS]]
    return None


def _is_key(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _public_address(source: str) -> str:
    """An address without user, password, query and fragment; of those that are not of the web, the last part."""
    try:
        parts = urlsplit(source)
    except ValueError:
        return name_of(source)
    if parts.scheme not in ("http", "https") or re.search(r"\s", source):
        return name_of(parts.path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _sentences(trained: Trained, encoder: HubertEncoder, facts: Facts) -> Iterator[str]:
    config, fine_tuned = trained.config, trained.head is not None
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    yield f"HuBERT ([Hsu et al. 2021](https://arxiv.org/abs/2106.07447)), {millions:.1f} M parameters:"
    yield f"{config.num_layers} layers of {config.dim}, for 16 kHz speech, one frame per 20 ms."
    yield ""
    yield "| | |"
    yield "|---|---|"
    if fine_tuned and trained.vocabulary:
        tokens = escaped(" ".join(trained.vocabulary["tokens"]))
        yield f"| task | speech recognition, CTC over {len(trained.vocabulary['tokens'])} tokens: {tokens} |"
    else:
        clusters = " + ".join(map(str, trained.num_clusters))
        yield f"| task | masked prediction of {clusters} clusters |" if clusters else "| task | features |"
    if facts.steps:
        yield f"| steps | {facts.steps} |"
    if facts.data:
        yield f"| trained on | {', '.join(map(escaped, facts.data))} |"
    if facts.audio:
        counted = [f"{value:g} {name}" for name, value in facts.audio.items()]
        yield f"| audio | {', '.join(counted)} |"
    if facts.units:
        labels = [f"{name} {value}"[:LONGEST] for name, value in facts.units.items()]
        yield f"| labels | {', '.join(map(escaped, labels))} |"
    measured = {layer: of["pnmi"] for layer, of in facts.quality.items() if _is_number(_inside(of).get("pnmi"))}
    for layer, pnmi in [*measured.items()][:ROWS]:
        if pnmi <= 1:
            yield f"| PNMI, {escaped(told(layer))} | {pnmi:.3f} |"
    for part, what in (("words", "WER"), ("letters", "CER")):
        of = _inside(facts.scores, part)
        if _is_number(of.get("rate")):
            low, high = of.get("low"), of.get("high")
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if _is_number(low) and _is_number(high) else ""
            yield f"| {what} in its run's last test | {100 * of['rate']:.1f} %{interval} |"
    for metric, value in facts.metrics.items():
        yield f"| {escaped(metric[:LONGEST])} | {value:.4g} |"
    source = told_source(trained.source)
    for key in ("source", "sha256", "encoder"):
        if source.get(key) is not None:
            yield f"| {key} | {escaped(source[key])} |"


def _counts(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Hours, speakers and utterances of the training data, as the data module saved them."""
    for name in ("PretrainingData", "TranscribedData"):
        counted = _inside(checkpoint, name, "audio")
        if counts := {key: counted[key] for key in ("hours", "speakers", "utterances") if _is_number(counted.get(key))}:
            return counts
    return {}


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is one of those that a card tells: a rate, a count or a loss, none of which is below 0."""
    return type(value) in (int, float) and 0 <= value < 2**63 and math.isfinite(value)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and _is_number(value)


def _inside(content: Any, *keys: str) -> dict[str, Any]:
    """What a file of others holds under these keys, if it is a dictionary there; an empty one if not."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _callbacks(config: Any) -> list[Any]:
    callbacks = _inside(config, "trainer").get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _is_relabel(callback: Any) -> bool:
    return isinstance(callback, dict) and str(callback.get("class_path")).endswith("Relabel")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return _inside(json.loads(read_regular(file)))
    except (OSError, ValueError, RecursionError):
        return {}
