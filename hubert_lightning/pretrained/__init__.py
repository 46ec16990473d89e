"""Weights of any system, read as ours."""
