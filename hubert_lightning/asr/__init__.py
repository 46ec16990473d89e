"""From frames to words: CTC models, beam search, transcripts, scores."""
