"""Settings of the optimizers of the paper's recipes, for configs that name no optimizer."""

from typing import Any

BASE_ADAM: dict[str, Any] = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01, "fused": True}
"""Pre-training of Base: fairseq config/pretrain/hubert_base_librispeech.yaml, whose Adam decouples weight decay."""

TEN_HOURS_ADAM: dict[str, Any] = {"lr": 5e-5, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
"""Fine-tuning on 10 hours: fairseq wav2vec/config/finetuning/base_10h.yaml."""
