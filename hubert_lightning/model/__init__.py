"""The encoder, the cluster predictor, and checkpoints of both: plain torch, at home in a notebook."""
