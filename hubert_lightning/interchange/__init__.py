"""Models for other systems and from them."""
