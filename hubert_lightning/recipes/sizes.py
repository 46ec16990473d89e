"""Sizes of the encoder that `hubert pretrain --size` names."""

SIZES = ("small", "base", "large", "xlarge")
"""Sizes that have a config in `configs/pretrain`."""
