"""The HTTP service of `hubert serve`."""
