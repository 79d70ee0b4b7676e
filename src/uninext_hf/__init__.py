"""UNINEXT for Hugging Face Transformers: one model that finds instances in pictures and video."""

__version__ = "0.1.0.dev0"
