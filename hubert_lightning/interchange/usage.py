"""Lines of Python in a model card that load the model, for each export format."""

from string import Template

USAGE = {
    "transformers": Template("""\
```python
from transformers import $processor, $model

model, processor = $model.from_pretrained($name), $processor.from_pretrained($name)
```"""),
    "torchaudio": Template("""\
```python
import json

import torch
import torchaudio

folder = $name
about = json.load(open(f"{folder}/model.json"))
model = getattr(torchaudio.models, about["function"].split(".")[-1])(**about["arguments"])
model.load_state_dict(torch.load(f"{folder}/model.pt", weights_only=True))
```

If `normalize_waveform` is true in `model.json`, give each utterance zero mean and unit variance first."""),
    "fairseq": Template("""\
```python
from fairseq import checkpoint_utils

folder = $name
load = checkpoint_utils.load_model_ensemble_and_task
[model], _, _ = load([f"{folder}/checkpoint.pt"], arg_overrides={"data": folder})
```

fairseq as of September 2025 opens no fine-tuned HuBERT: its `hubert_asr.py` asks for `autoregressive`, which its config
lacks. s3prl opens pre-trained models: `S3PRLUpstream("hubert_local", path_or_url=f"{folder}/checkpoint.pt")`.
"""),
    "safetensors": Template("""\
```python
from hubert_lightning import load_encoder

encoder = load_encoder($name)
```"""),
    "onnx": Template("""\
```python
import numpy
import onnxruntime

folder = $name
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
length = numpy.array([waveform.shape[1]])  # of (1, samples) float32, 400 or more
[output] = session.run(None, {"waveform": waveform, "length": length})
```

Batches may have any size. If the encoder has a group norm, as Base, padding counts in it: give it utterances one by
one, or of one length."""),
}
"""Format → lines; `name` is the folder, as a literal of Python."""
