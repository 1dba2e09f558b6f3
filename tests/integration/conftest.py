"""The real model, converted at most once on a machine."""

from pathlib import Path

import pytest

from actlake.ingest.models import resolve_model


@pytest.fixture(scope="session")
def gemma_270m() -> Path:
    """The packaged Gemma 3 270M as bf16 safetensors with its tokenizer; in the user's cache, as the demo's is."""
    return Path(resolve_model("gemma-3-270m-gguf").path)
