"""`python -m hubert_lightning`: the command `hubert`."""

from hubert_lightning.cli import main

main()
