"""The model card of an export: origin, quality and use of the model."""

import re
from collections.abc import Iterator
from string import Template

from hubert_lightning.errors import UserError
from hubert_lightning.hub import CardFacts
from hubert_lightning.interchange.run_facts import (
    MAX_ROWS,
    MAX_VALUE_LENGTH,
    Facts,
    is_number,
    mapping_at,
    public,
    public_provenance,
)
from hubert_lightning.interchange.usage import USAGE
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.weights import PretrainedWeights

CARD = Template("""\
---
$front_matter
---

# $title

HuBERT ([Hsu et al. 2021](https://arxiv.org/abs/2106.07447)), $millions M parameters:
$layers layers of $dim, for 16 kHz speech, one frame per $hop ms.

| | |
|---|---|
$rows

## Use

$usage
""")

METRICS = {"words": "WER", "letters": "CER"}
"""Error rates by the part of a scores.json that has them."""

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
"""Characters that would begin a tag, a cell, code, an address or a formula."""


def model_card(
    name: str,
    weights: PretrainedWeights,
    encoder: HubertEncoder,
    facts: Facts,
    format: str,
    stated: CardFacts = CardFacts(),
) -> str:
    """Write a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        name: Name of the folder, or of the repository on the hub.
        weights: Weights of the model, their provenance fit to be published.
        encoder: Encoder of the model.
        facts: Facts about its run.
        format: Name of the export format.
        stated: Licence, languages and datasets that the author of the model states.
    """
    is_recogniser = weights.head is not None
    usage = USAGE[format].substitute(
        name=f'"{name}"' if re.fullmatch(r"[\w ./-]+", name, re.ASCII) else ascii(name),
        model=("WavLM" if encoder.config.position_buckets else "Hubert") + ("ForCTC" if is_recogniser else "Model"),
        processor="AutoProcessor" if is_recogniser else "AutoFeatureExtractor",
    )
    rows = [f"| {escaped(label)} | {value} |" for label, value in _rows(weights, facts)]
    return CARD.substitute(
        front_matter=_front_matter(name, is_recogniser, facts, format, stated),
        title=escaped(name),
        millions=f"{sum(parameter.numel() for parameter in encoder.parameters()) / 1e6:.1f}",
        layers=weights.config.num_layers,
        hop=f"{1000 * weights.config.clock.seconds:g}",
        dim=weights.config.dim,
        rows="\n".join(rows),
        usage=usage,
    )


def check_stated(stated: CardFacts) -> None:
    """Check what an author states, before a model is written.

    Raises:
        UserError: A licence, a language or a dataset cannot be one of the hub.
    """
    if stated.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", stated.license):
        raise UserError(f"license {stated.license!r}: no identifier of the hub; give one such as mit or cc-by-4.0")
    if wrong := [code for code in stated.language if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*", code)]:
        raise UserError(f"language {wrong[0]!r}: no code of a language; give one such as en, pt or yue")
    if wrong := [name for name in stated.datasets if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII)]:
        raise UserError(f"datasets {wrong[0]!r}: no name on the hub; give one such as openslr/librispeech_asr")


def _front_matter(name: str, is_recogniser: bool, facts: Facts, format: str, stated: CardFacts) -> str:
    """The front matter in YAML, with the error rates of the last test of the model's run."""
    from huggingface_hub import EvalResult, ModelCardData  # takes a second

    check_stated(stated)
    task = "automatic-speech-recognition" if is_recogniser else "feature-extraction"
    scores = [(metric, mapping_at(facts.scores, part).get("rate")) for part, metric in METRICS.items()]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="custom",
            dataset_name=", ".join(facts.test_data) or "test of the run",
            metric_type=metric.lower(),
            metric_name=f"{metric} in percent",
            metric_value=round(100 * rate, 2),
        )
        for metric, rate in scores
        if is_recogniser and is_number(rate)
    ]
    data = ModelCardData(
        license=stated.license,
        language=list(stated.language) or None,
        datasets=list(stated.datasets) or None,
        metrics=[result.metric_type for result in results] or None,
        model_name=_plain(name) if results else None,
        eval_results=results or None,
        library_name=format if format in ("transformers", "onnx") else "hubert_lightning",
        pipeline_tag=task,
        tags=["hubert", "speech", "hubert_lightning"],
    )
    return str(data.to_yaml())


def _plain(text: object) -> str:
    """A text on one line, without characters that are not printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def escaped(text: object) -> str:
    """Escape a text for a cell or heading in Markdown, which then shows it as it is, without links, tags or code."""
    shown = "".join(ENTITIES.get(character, character) for character in _plain(text))
    return re.sub(r"\bwww\.", "www&#46;", re.sub(r"([\\*_\[\]~])", r"\\\1", shown), flags=re.IGNORECASE)


def _rows(weights: PretrainedWeights, facts: Facts) -> Iterator[tuple[str, str]]:
    """Write the rows of a card's table: label, which is not yet escaped, and value, which is."""
    yield "task", _task(weights)
    if facts.steps:
        yield "steps", str(facts.steps)
    if facts.data:
        yield "trained on", ", ".join(map(escaped, facts.data))
    if facts.audio:
        yield "audio", ", ".join(f"{value:g} {name}" for name, value in facts.audio.items())
    if facts.units:
        labels = [f"{name} {value}"[:MAX_VALUE_LENGTH] for name, value in facts.units.items()]
        yield "labels", ", ".join(map(escaped, labels))
    measured = {layer: mapping_at(quality).get("pnmi") for layer, quality in facts.quality.items()}
    numbers = [(layer, pnmi) for layer, pnmi in measured.items() if is_number(pnmi)]
    for layer, pnmi in numbers[:MAX_ROWS]:
        if pnmi <= 1:
            yield f"PNMI, {public(layer)}", f"{pnmi:.3f}"
    for part, metric in METRICS.items():
        score = mapping_at(facts.scores, part)
        if is_number(score.get("rate")):
            low, high = score.get("low"), score.get("high")
            interval = f" ({100 * low:.1f} to {100 * high:.1f})" if is_number(low) and is_number(high) else ""
            yield f"{metric} in its run's last test", f"{100 * score['rate']:.1f} %{interval}"
    for name, value in facts.metrics.items():
        yield name[:MAX_VALUE_LENGTH], f"{value:.4g}"
    provenance = public_provenance(weights.provenance)
    for key in ("source", "sha256", "encoder"):
        if provenance.get(key) is not None:
            yield key, escaped(provenance[key])


def _task(weights: PretrainedWeights) -> str:
    if weights.head is not None and weights.vocabulary is not None:
        tokens = weights.vocabulary.tokens
        return f"speech recognition, CTC over {len(tokens)} tokens: {escaped(' '.join(tokens))}"
    clusters = " + ".join(map(str, weights.num_clusters))
    return f"masked prediction of {clusters} clusters" if clusters else "features"
