"""Fine-tune a language model to file medical transcriptions under their specialty, and know how good it is."""

__version__ = "0.1.0"
