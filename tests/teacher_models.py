"""Small speech encoders of transformers with random weights, one for each family that can be a teacher."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from foreign_models import disturbed
from torch import Tensor

CONVOLUTIONS = {"conv_dim": [48] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SQUEEZED = {
    "squeeze_factor": 1,
    "conv_dim": [48] * 13,
    "num_conv_pos_embeddings": 15,
    "num_conv_pos_embedding_groups": 4,
}
GROUP = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LAYER = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec 2.0": ("Wav2Vec2", CONVOLUTIONS | GROUP),
    "XLS-R": ("Wav2Vec2", CONVOLUTIONS | LAYER | {"conv_bias": True}),
    "WavLM": ("WavLM", CONVOLUTIONS | GROUP),
    "WavLM Large": ("WavLM", CONVOLUTIONS | LAYER),
    "data2vec": ("Data2VecAudio", CONVOLUTIONS | {"num_conv_pos_embeddings": 3, "conv_pos_kernel_size": 5}),
    "UniSpeech": ("UniSpeech", CONVOLUTIONS | GROUP),
    "UniSpeech-SAT": ("UniSpeechSat", CONVOLUTIONS | GROUP),
    "UniSpeech-SAT Large": ("UniSpeechSat", CONVOLUTIONS | LAYER),
    "conformer": ("Wav2Vec2Conformer", CONVOLUTIONS | LAYER | {"position_embeddings_type": "relative"}),
    "rotary conformer": ("Wav2Vec2Conformer", CONVOLUTIONS | LAYER | {"position_embeddings_type": "rotary"}),
    "wav2vec-BERT": ("Wav2Vec2Bert", {}),
    "DistilHuBERT": ("Hubert", CONVOLUTIONS | GROUP | {"feat_proj_layer_norm": False}),
    "10 ms": ("Wav2Vec2", CONVOLUTIONS | LAYER | {"conv_stride": [5, 2, 2, 2, 2, 2, 1]}),
    "SEW": ("SEW", SQUEEZED | GROUP),
    "SEW-D": ("SEWD", SQUEEZED | LAYER | {"pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}),
}
"""Name → class of transformers without "Model", and its settings."""


def random_teacher(family: str, folder: Path, head: str = "Model", **settings: Any) -> Any:
    """Save a small random model of a family with its feature extractor, and return it.

    Args:
        family: Name in `FAMILIES`.
        folder: Directory to write.
        head: End of the class, such as ForCTC.
        settings: Settings of config.json that differ.
    """
    name, values = FAMILIES[family]
    size = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = getattr(transformers, f"{name}Config")(**{**size, **values, **settings})
    torch.manual_seed(0)
    model = disturbed(getattr(transformers, name + head)(config))
    model.save_pretrained(folder)
    extractor_of(family).save_pretrained(folder)
    return model


def extractor_of(family: str) -> Any:
    """Feature extractor of a family, as released models of its kind have it."""
    name, values = FAMILIES[family]
    if name == "Wav2Vec2Bert":
        return transformers.SeamlessM4TFeatureExtractor(padding_value=1)
    masks = values.get("feat_extract_norm", "layer") == "layer"
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=family != "WavLM", return_attention_mask=masks)


@torch.no_grad()
def hidden_states(family: str, model: Any, waveforms: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What transformers computes of waveforms: all hidden states, and the frames that it has seen, (batch, frames)."""
    inputs = extractor_of(family)(
        [waveform.numpy() for waveform in waveforms], padding=True, sampling_rate=16_000, return_tensors="pt"
    )
    output = model.base_model(**inputs, output_hidden_states=True)
    layers = [*output.hidden_states]
    if "input_features" in inputs:
        return layers, inputs["attention_mask"].bool()
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    frames = model.base_model._get_feat_extract_output_lengths(lengths)
    return layers, torch.arange(layers[0].shape[1]) < frames[:, None]


def edited(folder: Path, file: str = "config.json", **settings: Any) -> None:
    """Change settings in a JSON file of a directory; None removes one."""
    content = json.loads((folder / file).read_text()) | settings
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / file).write_text(json.dumps(kept))
