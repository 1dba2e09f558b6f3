"""Models: what a name stands for, its shape, and its tokenizer; ``loading`` reads the weights."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlake.ingest import gguf_model, model_files
from actlake.ingest.extras import needs
from actlake.ingest.gemma3 import GEMMA_3, Gemma3Size
from actlake.ingest.hooks import architecture, stream_width
from actlake.storage.errors import ModelAccessError
from actlake.storage.hookpoints import STREAMS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def _silent(_message: str) -> None:
    """Drop a message."""


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model that was found.

    ``name`` as in the job file; ``revision`` the commit of a Hub model, the sha256 of the packaged one's GGUF, None
    for a folder; ``path`` the local folder; ``fingerprint`` the sha256 of weights and config, equal on every machine.
    """

    name: str
    revision: str | None
    path: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model, from its config alone; ``d_attn_z`` is heads x head size, ``d_kv`` that of keys."""

    architecture: str
    n_layers: int
    d_model: int
    d_attn_z: int
    d_kv: int
    d_ff: int
    context_length: int
    vocab_size: int

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in vars(self).items() if name != "architecture" and value < 1}
        if wrong:
            raise ModelAccessError(f"the config of this {self.architecture} gives {wrong}; sizes are at least 1")

    def widths(self) -> dict[str, int]:
        """Return every hook point's width, in layer then stream order."""
        return {
            f"layers.{layer}.{stream}": stream_width(stream, d_model=self.d_model, d_attn_z=self.d_attn_z)
            for layer in range(self.n_layers)
            for stream in STREAMS
        }


def resolve_model(name: str, *, revision: str | None = None, notify: Callable[[str], None] = _silent) -> ModelRef:
    """Find a model: the packaged one, a folder, or a Hub model, which is fetched where it is not cached.

    The packaged weights are converted at first use; ``notify`` hears of that and of their terms. Raises
    ``ModelAccessError`` for a model that is absent, gated or incomplete, ``MissingExtraError`` for a missing package.
    """
    if name == gguf_model.PACKAGED:
        _check_packaged_revision(revision)
        folder, found = gguf_model.converted(notify), gguf_model.packaged_sha256()
        return ModelRef(name=name, revision=found, path=str(folder), fingerprint=model_files.fingerprint(folder))
    local = model_files.local_folder(name, revision)
    folder = model_files.download(name, revision) if local is None else local
    model_files.check_folder(folder, name)
    architecture(_architecture_name(folder / "config.json"))
    return ModelRef(
        name=name,
        revision=folder.name if local is None else None,
        path=str(folder),
        fingerprint=model_files.fingerprint(folder),
    )


def _check_packaged_revision(revision: str | None) -> None:
    if revision is not None and revision != gguf_model.packaged_sha256():
        raise ModelAccessError(
            f"the packaged model is revision {gguf_model.packaged_sha256()}, not {revision!r}; leave revision out"
        )


def model_shape(name: str, *, revision: str | None = None) -> ModelShape:
    """Return a model's sizes from its config alone; no weights are read, and none converted.

    The published Gemma 3 models need neither network nor access for that.

    Raises ``ModelAccessError`` for a model that is absent, gated or of an unknown architecture.
    """
    if name == gguf_model.PACKAGED:
        _check_packaged_revision(revision)
        return shape_of(gguf_model.PACKAGED_CONFIG, "Gemma3ForCausalLM")
    folder = model_files.local_folder(name, revision)
    if folder is None and name in GEMMA_3:
        return _published_shape(GEMMA_3[name])
    config = model_files.download_config(name, revision) if folder is None else folder / "config.json"
    if not config.is_file():
        raise ModelAccessError(f"model {name!r} lacks config.json in {config.parent}; give a model's folder")
    return shape_of_config(config)


def shape_of(text_config: Mapping[str, Any], architecture_name: str) -> ModelShape:
    """Return the sizes that a text model's config gives, with all its defaults filled in."""
    n_heads, d_model = text_config["num_attention_heads"], text_config["hidden_size"]
    head_dim = text_config.get("head_dim") or d_model // n_heads
    return ModelShape(
        architecture=architecture_name,
        n_layers=text_config["num_hidden_layers"],
        d_model=d_model,
        d_attn_z=n_heads * head_dim,
        d_kv=text_config["num_key_value_heads"] * head_dim,
        d_ff=text_config["intermediate_size"],
        context_length=text_config["max_position_embeddings"],
        vocab_size=text_config["vocab_size"],
    )


def _published_shape(size: Gemma3Size) -> ModelShape:
    return ModelShape(
        architecture="Gemma3ForConditionalGeneration" if size.multimodal else "Gemma3ForCausalLM",
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_attn_z=size.n_heads * size.head_dim,
        d_kv=size.n_kv_heads * size.head_dim,
        d_ff=size.d_ff,
        context_length=size.context_length,
        vocab_size=size.vocab_size,
    )


def shape_of_config(path: Path) -> ModelShape:
    """Return the sizes that a config.json gives; ``ModelAccessError`` where it cannot be used."""
    name = _architecture_name(path)
    architecture(name)
    with needs("ingest", "reading a model's config"):
        from transformers import AutoConfig
    try:
        # Published configs leave out what equals the class's defaults, so only the class can complete them.
        text = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, TypeError) as error:
        raise ModelAccessError(f"{path} cannot be read by transformers ({error}); fetch the model again") from error
    return shape_of(text.to_dict(), name)


def _architecture_name(path: Path) -> str:
    try:
        config = json.loads(path.read_text())
        name = str(config["architectures"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise ModelAccessError(f"{path} names no architecture ({error!r}); it must be a model's config.json") from error
    model_files.check_config(config, path)
    return name


def load_tokenizer(ref: ModelRef) -> "PreTrainedTokenizerFast":
    """Return the model's tokenizer, exactly as its tokenizer.json defines it."""
    with needs("ingest", "tokenising"):
        from transformers import PreTrainedTokenizerFast
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(ref.path, local_files_only=True)
    return loaded


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the sha256 of what the tokenizer does: its definition and the ids of its special tokens.

    Paths, and truncation and padding, which calls change, are no part of it.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    with _as_defined(tokenizer.backend_tokenizer) as backend:
        definition: str = backend.to_str()
    return hashlib.sha256(f"{definition}\n{json.dumps(special)}".encode()).hexdigest()


@contextmanager
def _as_defined(backend: Any) -> Iterator[Any]:
    """Take truncation and padding off a ``tokenizers.Tokenizer`` for a moment."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
