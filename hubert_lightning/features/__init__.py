"""From recordings to one row of features for every frame, streamed."""
