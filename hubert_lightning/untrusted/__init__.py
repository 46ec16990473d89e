"""Readers of untrusted files, which never run code in them."""
