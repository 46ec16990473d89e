"""Formats of checkpoints: each module reads one system's files as `Trained`, and writes them."""
