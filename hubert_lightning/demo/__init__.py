"""The whole method on synthetic speech."""
