"""The whole method on speech that is synthesised on the spot."""
