"""Build, store and stream activation datasets of language models."""

__version__ = "0.1.0.dev0"
