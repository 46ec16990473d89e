"""Files that others wrote, read without running anything that is in them."""
