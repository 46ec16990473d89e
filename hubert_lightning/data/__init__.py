"""From audio folders to batches: manifests, labels, masks, text."""
