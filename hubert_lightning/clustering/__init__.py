"""Features, K-means, and how well clusters match phones."""
