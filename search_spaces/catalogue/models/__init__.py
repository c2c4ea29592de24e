"""Dimensions of known models, one file each."""
