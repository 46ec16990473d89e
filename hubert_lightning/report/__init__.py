"""Pages that show runs and their results: one HTML file each, which needs no network."""
