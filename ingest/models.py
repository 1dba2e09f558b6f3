"""Models: what a name stands for, its shape, its tokenizer, and the loaded text model."""

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
from actlake.ingest.hooks import Architecture, architecture, stream_width
from actlake.storage.errors import BadInputError, ModelAccessError
from actlake.storage.hookpoints import STREAMS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

_DTYPES = ("bfloat16", "float32")


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
    """The sizes of a model, from its config alone; ``d_attn_z`` is heads x head size."""

    architecture: str
    n_layers: int
    d_model: int
    d_attn_z: int
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


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A text model ready to run: ``text`` embeds tokens and runs the blocks; the logits' weights are not part of it.

    ``kernels`` says how matrices are multiplied, which decides the last bits of every activation.
    """

    text: "torch.nn.Module"
    shape: ModelShape
    device: "torch.device"
    dtype: "torch.dtype"
    kernels: str

    def describe(self) -> dict[str, str]:
        """Return what the activations' last bits depend on besides the batch shape, for a record's provenance."""
        import torch
        import transformers

        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability()
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": f"{self.device.type}: {name}",
            "kernels": self.kernels,
            "threads": str(torch.get_num_threads()),
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
        return _packaged_shape(gguf_model.PACKAGED_CONFIG)
    folder = model_files.local_folder(name, revision)
    if folder is None and name in GEMMA_3:
        return _published_shape(GEMMA_3[name])
    config = model_files.download_config(name, revision) if folder is None else folder / "config.json"
    if not config.is_file():
        raise ModelAccessError(f"model {name!r} lacks config.json in {config.parent}; give a model's folder")
    return _shape_of_config(config)


def _packaged_shape(config: Mapping[str, Any]) -> ModelShape:
    return ModelShape(
        architecture=config["architectures"][0],
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_attn_z=config["num_attention_heads"] * config["head_dim"],
        d_ff=config["intermediate_size"],
        context_length=config["max_position_embeddings"],
        vocab_size=config["vocab_size"],
    )


def _published_shape(size: Gemma3Size) -> ModelShape:
    return ModelShape(
        architecture="Gemma3ForConditionalGeneration" if size.multimodal else "Gemma3ForCausalLM",
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_attn_z=size.n_heads * size.head_dim,
        d_ff=size.d_ff,
        context_length=size.context_length,
        vocab_size=size.vocab_size,
    )


def _shape_of_config(path: Path) -> ModelShape:
    name = _architecture_name(path)
    architecture(name)
    with needs("ingest", "reading a model's config"):
        from transformers import AutoConfig
    try:
        # Published configs leave out what equals the class's defaults, so only the class can complete them.
        text = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, TypeError) as error:
        raise ModelAccessError(f"{path} cannot be read by transformers ({error}); fetch the model again") from error
    return _packaged_shape({**text.to_dict(), "architectures": [name]})


def _architecture_name(path: Path) -> str:
    try:
        config = json.loads(path.read_text())
        return str(config["architectures"][0])
    except (ValueError, LookupError, TypeError) as error:
        raise ModelAccessError(f"{path} names no architecture ({error!r}); it must be a model's config.json") from error


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


def load_model(ref: ModelRef, *, dtype: str = "bfloat16", device: str = "cpu") -> LoadedModel:
    """Load the text model of ``ref``, frozen and in evaluation mode.

    ``dtype`` is "bfloat16" or "float32", ``device`` as torch writes it. Raises ``BadInputError`` for another dtype or
    a device that is not there, ``ModelAccessError`` for weights that do not fit the architecture.
    """
    shape = _shape_of_config(Path(ref.path) / "config.json")
    rows = architecture(shape.architecture)
    _check_dtype(dtype, ref.name, rows)
    with needs("ingest", "running a model"):
        import torch

        from actlake.ingest import cpu_bf16
    place = _device(device)
    text = _read_weights(ref, shape.architecture, getattr(torch, dtype)).get_submodule(rows.text)
    text.requires_grad_(False).eval()
    kernels = "native"
    if place.type == "cpu" and dtype == "bfloat16" and not cpu_bf16.has_fast_bf16():
        cpu_bf16.widen_linears(text.get_submodule(rows.layers))
        kernels = "bfloat16 linear layers in float32, rounded once"
    return LoadedModel(text=text.to(place), shape=shape, device=place, dtype=getattr(torch, dtype), kernels=kernels)


def _check_dtype(dtype: str, name: str, rows: Architecture) -> None:
    if dtype == "float16" and rows.no_float16:
        raise BadInputError(f"dtype 'float16' cannot hold {name!r}: {rows.no_float16}; use 'bfloat16'")
    if dtype not in _DTYPES:
        raise BadInputError(f"dtype {dtype!r} is not supported; use one of {', '.join(_DTYPES)}")


def _device(device: str) -> "torch.device":
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise BadInputError(f"device {device!r} is not one that torch knows; use 'cpu' or 'cuda'") from error
    n_gpus = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= n_gpus:
        raise BadInputError(f"device {device!r} is not there: torch sees {n_gpus} CUDA devices; use 'cpu'")
    return place


def _read_weights(ref: ModelRef, class_name: str, dtype: "torch.dtype") -> "torch.nn.Module":
    import transformers

    with _no_progress_bar():
        model, info = getattr(transformers, class_name).from_pretrained(
            ref.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    # transformers fills what is missing with random numbers and only warns.
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ModelAccessError(
            f"the weights of {ref.name!r} in {ref.path} do not fit its config: {len(wrong)} missing or of another "
            f"shape, e.g. {wrong[0]}; fetch the model again"
        )
    loaded: torch.nn.Module = model
    return loaded


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
