"""Pre-trained weights of any system, converted to this package's names."""
