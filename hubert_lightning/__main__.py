from hubert_lightning.cli import main

main()
