"""What of a model lies on this machine already: nothing here fetches, converts or loads weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from actlake.ingest import gguf_model, model_files
from actlake.ingest.models import ModelRef, load_tokenizer
from actlake.storage.errors import MissingExtraError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tokenizer_at_hand(name: str, revision: str | None = None) -> "PreTrainedTokenizerFast | None":
    """Return a model's tokenizer where it needs no network and no conversion; None where it does."""
    folder = _tokenizer_folder(name, revision)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        return load_tokenizer(ModelRef(name=name, revision=revision, path=str(folder), fingerprint=""))
    except MissingExtraError:
        return None


def _tokenizer_folder(name: str, revision: str | None) -> Path | None:
    if name == gguf_model.PACKAGED:
        return gguf_model.converted_already()
    folder = model_files.local_folder(name, revision)
    if folder is not None:
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(name, "tokenizer.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
