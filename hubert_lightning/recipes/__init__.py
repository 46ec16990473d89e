"""From recordings, or a table of sentences, to a trained model in one command."""
