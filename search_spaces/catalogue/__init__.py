"""Data files: dimensions of known models (`models/`, in the words of a Hugging Face config.json) and known hardware."""
