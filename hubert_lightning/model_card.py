"""What a model says of itself to who finds it: how it came about, what it is worth, how it is used."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hubert_lightning.model.formats.checkpoint import read_checkpoint
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.model.trained import Trained

USE = {
    "transformers": """```python
from transformers import {processor}, {model}

model, processor = {model}.from_pretrained("{name}"), {processor}.from_pretrained("{name}")
```""",
    "torchaudio": """```python
import json

import torch
import torchaudio

about = json.load(open("{name}/model.json"))
model = getattr(torchaudio.models, about["function"].split(".")[-1])(**about["arguments"])
model.load_state_dict(torch.load("{name}/model.pt", weights_only=True))
```

Where `normalize_waveform` is true in `model.json`, give each utterance zero mean and unit variance first.""",
    "fairseq": """```python
from fairseq import checkpoint_utils

load = checkpoint_utils.load_model_ensemble_and_task
[model], _, _ = load(["{name}/checkpoint.pt"], arg_overrides={{"data": "{name}"}})
```

fairseq as of September 2025 opens no fine-tuned HuBERT, whoever made it: its `hubert_asr.py` asks for `autoregressive`,
which its config lacks. s3prl opens what was not fine-tuned:
`S3PRLUpstream("hubert_local", path_or_url="{name}/checkpoint.pt")`.
""",
    "safetensors": """```python
from hubert_lightning import load_encoder

encoder = load_encoder("{name}")
```""",
    "onnx": """```python
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("{name}/model.onnx")
length = numpy.array([waveform.shape[1]])  # of (1, samples) float32, 400 or more
[output] = session.run(None, {{"waveform": waveform, "length": length}})
```

Batches may be of any size; where the encoder has a group norm, as Base, padding counts in it: give it utterances
one by one, or of one length.""",
}


@dataclass(frozen=True)
class Facts:
    """What is known of the run that a checkpoint came from.

    steps:   that it was trained for, if it says so
    data:    manifests that it was trained on
    metrics: of the validation that its run ended with, by name
    scores:  error rates of the last `hubert test` in its run, as `hubert score` writes them
    units:   of its labels: what was clustered, into how many
    quality: of its units, as `hubert quality` found it, by layer
    """

    steps: int | None = None
    data: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For the file that holds the model."""
        return {"steps": self.steps, "data": list(self.data)} if self.steps else {}


def run_facts(path: Path) -> Facts:
    """What lies beside a checkpoint of a run: config.yaml, metrics.json, scores.json, layers.json, quality.json."""
    if not path.is_file() or path.suffix != ".ckpt":
        return Facts()
    folder, config = path.parent, dict[str, Any]()
    if (folder / "config.yaml").is_file():
        # a card is written of what can be read; a date or a number in YAML may be none
        with suppress(yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError):
            config = _object(yaml.safe_load((folder / "config.yaml").read_text("utf-8")))
    data = _object(_object(config.get("data")).get("init_args")).get("train") or []
    data = data if isinstance(data, (str, list)) else []
    makers = [
        _object(one.get("init_args")) for one in _callbacks(config) if str(one.get("class_path")).endswith("Relabel")
    ]
    labels: dict[str, Any] = makers[0] if makers else {}
    quality = _read(folder / "layers.json") or _read(folder / "quality.json") or _read(folder / "quality/quality.json")
    steps, metrics = read_checkpoint(path).get("global_step") or None, _read(folder / "metrics.json")
    if metrics.get("steps") != steps:  # of the end of the run, and not of this checkpoint
        metrics = {}
    return Facts(
        steps,
        tuple(map(str, [data] if isinstance(data, str) else data)),
        _numbers({name: value for name, value in metrics.items() if name.startswith("val/")}),
        {part: _numbers(rates) for part, rates in _read(folder / "scores.json").items()},
        {name: labels[name] for name in ("features", "layer", "clusters") if labels.get(name) is not None},
        {layer: _numbers(of) for layer, of in quality.items()},
    )


def model_card(name: str, trained: Trained, encoder: HubertEncoder, facts: Facts, format: str) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads."""
    fine_tuned = trained.head is not None
    task = "automatic-speech-recognition" if fine_tuned else "feature-extraction"
    library = {"transformers": "transformers", "onnx": "onnx"}.get(format, "hubert_lightning")
    model, processor = ("HubertForCTC", "AutoProcessor") if fine_tuned else ("HubertModel", "AutoFeatureExtractor")
    front = [f"library_name: {library}", f"pipeline_tag: {task}", "tags: [hubert, speech, hubert_lightning]"]
    use = USE[format].format(name=name, model=model, processor=processor)
    lines = ["---", *front, "---", "", f"# {name}", "", *_sentences(trained, encoder, facts), "", "## Use", "", use, ""]
    return "\n".join(lines)


def _sentences(trained: Trained, encoder: HubertEncoder, facts: Facts) -> Iterator[str]:
    config, fine_tuned = trained.config, trained.head is not None
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    yield f"HuBERT ([Hsu et al. 2021](https://arxiv.org/abs/2106.07447)), {millions:.1f} M parameters:"
    yield f"{config.num_layers} layers of {config.dim}, for 16 kHz speech, one frame per 20 ms."
    yield ""
    yield "| | |"
    yield "|---|---|"
    if fine_tuned and trained.vocabulary:
        tokens = " ".join(trained.vocabulary["tokens"]).replace("|", "\\|")  # a bar would end the cell
        yield f"| task | speech recognition, CTC over {len(trained.vocabulary['tokens'])} tokens: {tokens} |"
    else:
        clusters = " + ".join(map(str, trained.num_clusters))
        yield f"| task | masked prediction of {clusters} clusters |" if clusters else "| task | features |"
    if facts.steps:
        yield f"| steps | {facts.steps} |"
    if facts.data:
        yield f"| trained on | {', '.join(facts.data)} |"
    if facts.units:
        yield f"| labels | {', '.join(f'{name} {value}' for name, value in facts.units.items())} |"
    for layer, of in facts.quality.items():
        if isinstance(of, dict) and of.get("pnmi") is not None:
            yield f"| PNMI, {layer} | {of['pnmi']:.3f} |"
    for part, what in (("words", "WER"), ("letters", "CER")):
        if (of := facts.scores.get(part)) and of.get("rate") is not None:
            low, high = of.get("low"), of.get("high")
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
            yield f"| {what} in its run's last test | {100 * of['rate']:.1f} %{interval} |"
    for metric, value in facts.metrics.items():
        yield f"| {metric} | {value:.4g} |"
    for key in ("source", "sha256", "encoder"):
        if key in trained.source:
            yield f"| {key} | {trained.source[key]} |"


def _callbacks(config: dict[str, Any]) -> list[dict[str, Any]]:
    callbacks = _object(config.get("trainer")).get("callbacks") or []
    return [one for one in (callbacks if isinstance(callbacks, list) else [callbacks]) if isinstance(one, dict)]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _numbers(value: Any) -> dict[str, float]:
    """The numbers in an object."""
    return {name: number for name, number in _object(value).items() if type(number) in (int, float)}


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return _object(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
