"""From features to cluster ids: K-means, label stores, and how well clusters match phones."""
