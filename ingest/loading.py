"""Loads a model's weights: the text model that activations are captured from, and the whole one where it is wanted."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actlake.ingest.extras import needs
from actlake.ingest.hooks import Architecture, architecture
from actlake.ingest.models import ModelRef, ModelShape, shape_of_config
from actlake.storage.errors import BadInputError, MissingExtraError, ModelAccessError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_DTYPES = ("bfloat16", "float32")
#: Implementations of attention, and the package that each needs. Never one of a Hub repository: that is code.
ATTENTION = {
    "sdpa": "torch",
    "eager": "torch",
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
}
#: Ways in which layers are dealt to devices; a table gives each module's device.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model ready to run: ``text`` embeds tokens and runs the blocks, ``whole`` has the logits, if asked for.

    ``device`` is where token ids go. ``kernels`` says how matrices are multiplied, which decides the last bits of
    every activation.
    """

    text: "torch.nn.Module"
    shape: ModelShape
    device: "torch.device"
    dtype: "torch.dtype"
    kernels: str
    whole: "torch.nn.Module | None" = None

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

    def logits(self, input_ids: "torch.Tensor") -> "torch.Tensor":
        """Return the logits [B, T, vocabulary] of int64 ``input_ids`` [B, T], without gradients.

        Raises ``BadInputError`` for a model that was loaded without ``head``.
        """
        import torch

        if self.whole is None:
            raise BadInputError("this model was loaded without its head; load_model(..., head=True) gives logits")
        with torch.inference_mode():
            found: torch.Tensor = self.whole(input_ids=input_ids.to(self.device), use_cache=False).logits
        return found


def load_model(
    ref: ModelRef,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    attn_implementation: str | None = None,
    compiled: bool = False,
    device_map: str | Mapping[str, str] | None = None,
    head: bool = False,
) -> LoadedModel:
    """Load the text model of ``ref``, frozen and in evaluation mode; with ``head``, what makes logits too.

    ``dtype`` is "bfloat16" or "float32", ``device`` as torch writes it. ``attn_implementation`` is one of
    ``ATTENTION``, by default what fits the architecture. ``compiled`` runs what lies between hook points through
    torch.compile. ``device_map`` spreads the layers over several devices ("auto", or a device for each module, as
    transformers has it), in place of ``device``.

    Raises ``BadInputError`` for what cannot be used here, ``ModelAccessError`` for weights that do not fit the
    architecture, ``MissingExtraError`` for an absent package.
    """
    shape = shape_of_config(Path(ref.path) / "config.json")
    rows = architecture(shape.architecture)
    _check_dtype(dtype, ref.name, rows)
    with needs("ingest", "running a model"):
        import torch

        from actlake.ingest import compiling, cpu_bf16
    place = _device(device)
    attention = _attention(attn_implementation, rows, place)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": attention}
    whole: Any = _read_weights(ref, shape.architecture, options | _placement(device_map))
    text = whole.get_submodule(rows.text)
    whole.requires_grad_(False).eval()
    kernels = ["native"]
    if device_map is not None:
        place = _spread(whole, text)
    if place.type == "cpu" and dtype == "bfloat16" and not cpu_bf16.has_fast_bf16():
        cpu_bf16.widen_linears(text.get_submodule(rows.layers))
        if head:
            whole.set_output_embeddings(cpu_bf16.WidenedLinear(whole.get_output_embeddings()))
        kernels = ["bfloat16 linear layers in float32, rounded once"]
    if device_map is None:
        (whole if head else text).to(place)
    if attention != rows.attention:
        kernels.append(f"{attention} attention")
    if compiled:
        compiling.compile_between_taps(text, rows, place)
        kernels.append("compiled")
    return LoadedModel(
        text=text,
        shape=shape,
        device=place,
        dtype=getattr(torch, dtype),
        kernels=", ".join(kernels),
        whole=whole if head else None,
    )


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


def _attention(asked: str | None, rows: Architecture, place: "torch.device") -> str:
    if asked is None:
        return rows.attention
    if asked not in ATTENTION:
        raise BadInputError(f"attn_implementation = {asked!r} is not known{nearest(asked, ATTENTION)}")
    package = ATTENTION[asked]
    if package != "torch" and place.type != "cuda":
        raise BadInputError(f"attn_implementation = {asked!r} runs on GPUs only, not on {str(place)!r}; use 'sdpa'")
    if find_spec(package) is None:
        raise BadInputError(
            f"attn_implementation = {asked!r} needs the package {package}, which is absent; install it, or use 'sdpa'"
        )
    if asked == "sdpa" and rows.attention == "eager":
        raise BadInputError(
            "attn_implementation = 'sdpa' would leave out this architecture's cap on attention scores; use 'eager'"
        )
    return asked


def _placement(device_map: str | Mapping[str, str] | None) -> dict[str, Any]:
    if device_map is None:
        return {}
    if find_spec("accelerate") is None:
        raise MissingExtraError(
            "device_map needs accelerate, which is absent; pip install 'actlake[multigpu]', or leave device_map out"
        )
    return {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}


def _spread(whole: "torch.nn.Module", text: "torch.nn.Module") -> "torch.device":
    """Return where token ids go; refuse a model that was not held by its devices."""
    import torch

    # A single device is not written down.
    places = {str(place) for place in getattr(whole, "hf_device_map", {}).values()}
    if len(places) > 1 and places & {"cpu", "disk", "meta"}:
        raise BadInputError(
            f"device_map left layers on {', '.join(sorted(places & {'cpu', 'disk', 'meta'}))}, because the GPUs here "
            "cannot hold the model: give the worker more of them (run.gpus_per_worker)"
        )
    embedding: Any = text.get_submodule("embed_tokens")
    device: torch.device = embedding.weight.device
    return device


def _read_weights(ref: ModelRef, class_name: str, options: Mapping[str, Any]) -> "PreTrainedModel":
    import transformers

    with _no_progress_bar():
        model, info = getattr(transformers, class_name).from_pretrained(
            ref.path,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    # transformers fills what is missing with random numbers and only warns.
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ModelAccessError(
            f"the weights of {ref.name!r} in {ref.path} do not fit its config: {len(wrong)} missing or of another "
            f"shape, e.g. {wrong[0]}; fetch the model again"
        )
    loaded: PreTrainedModel = model
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
