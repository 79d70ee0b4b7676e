"""Official checkpoints to ours and back."""

from .official import ConversionError, ConversionReport, load_official, to_official, verify_official

__all__ = ["ConversionError", "ConversionReport", "load_official", "to_official", "verify_official"]
