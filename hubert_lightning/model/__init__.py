"""The encoder and the cluster predictor, in plain torch."""
