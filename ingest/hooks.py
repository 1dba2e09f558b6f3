"""Where each stream lives in a model, as data: one row for each architecture.

To add a model family, add its class to ``ARCHITECTURES``: the path of the inner text model, and for each stream the
module inside a block and the side of it that is the stream's tensor. tests/ingest/test_streams.py holds every row
against the equations that define the streams; give it a tiny model of the family in tests/tiny_models.py.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from actlake.storage.errors import BadInputError, ModelAccessError
from actlake.storage.hookpoints import STREAMS, HookPoint

if TYPE_CHECKING:
    import torch
    from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One side of a module: ``module`` is a path inside a block, empty for the block itself.

    ``is_residual`` marks an input that the block itself goes on with as well, which a splice must therefore change in
    place: what enters the norm in the middle of a block is also what the MLP's output is added to.
    """

    module: str
    side: Literal["input", "output"]
    is_residual: bool = False

    def __str__(self) -> str:
        return f"{self.side} of {self.module or 'the block'}"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What actlake knows of a model class; ``text`` is the path of the module that embeds tokens and runs the blocks.

    ``attention`` is the implementation to use unless another is asked for. ``no_float16`` says why float16 cannot hold
    the activations; empty where it can.
    """

    text: str
    taps: Mapping[str, Tap]
    layers: str = "layers"
    attention: str = "sdpa"
    no_float16: str = ""

    def __post_init__(self) -> None:
        if set(self.taps) != set(STREAMS):
            raise ModelAccessError(f"an architecture needs a tap for each of {STREAMS}, not {tuple(self.taps)}")

    def tap(self, point: HookPoint) -> tuple[str, Tap]:
        """Return the path, inside the text model, of the module to hook, and the tap."""
        tap = self.taps[point.stream]
        return f"{self.layers}.{point.layer}.{tap.module}".rstrip("."), tap


#: Blocks that normalise what attention and MLP read, and nothing else.
_PRE_NORM_TAPS = {
    "resid_pre": Tap(module="", side="input"),
    "attn_z": Tap(module="self_attn.o_proj", side="input"),
    "attn_out": Tap(module="self_attn.o_proj", side="output"),
    "resid_mid": Tap(module="post_attention_layernorm", side="input", is_residual=True),
    "mlp_in": Tap(module="post_attention_layernorm", side="output"),
    "mlp_out": Tap(module="mlp", side="output"),
    "resid_post": Tap(module="", side="output"),
}
#: Blocks that normalise what attention and MLP write, too.
_SANDWICH_TAPS = _PRE_NORM_TAPS | {
    "attn_out": Tap(module="post_attention_layernorm", side="output"),
    "resid_mid": Tap(module="pre_feedforward_layernorm", side="input", is_residual=True),
    "mlp_in": Tap(module="pre_feedforward_layernorm", side="output"),
    "mlp_out": Tap(module="post_feedforward_layernorm", side="output"),
}
# Measured: layer 8 of the 270M exceeds it on ordinary text.
_GEMMA_3_NO_FLOAT16 = "Gemma 3's residual stream exceeds float16's largest value, 65,504"
_PRE_NORM = Architecture(text="model", taps=_PRE_NORM_TAPS)

ARCHITECTURES: Mapping[str, Architecture] = {
    "Gemma3ForCausalLM": Architecture(text="model", taps=_SANDWICH_TAPS, no_float16=_GEMMA_3_NO_FLOAT16),
    "Gemma3ForConditionalGeneration": Architecture(
        text="model.language_model", taps=_SANDWICH_TAPS, no_float16=_GEMMA_3_NO_FLOAT16
    ),
    # Its attention scores are capped, which scaled_dot_product_attention cannot do.
    "Gemma2ForCausalLM": Architecture(text="model", taps=_SANDWICH_TAPS, attention="eager"),
    "GemmaForCausalLM": _PRE_NORM,
    "LlamaForCausalLM": _PRE_NORM,
    "MistralForCausalLM": _PRE_NORM,
    "Qwen2ForCausalLM": _PRE_NORM,
    "Qwen3ForCausalLM": _PRE_NORM,
}


def architecture(name: str) -> Architecture:
    """Return what is known of a model class; ``ModelAccessError`` lists the known ones and says how to add one."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelAccessError(
            f"architecture {name!r} is unknown; known are {known}. To add it, add a row to ARCHITECTURES in "
            "actlake.ingest.hooks: the path of the text model and a module for each stream"
        )
    return ARCHITECTURES[name]


def stream_width(stream: str, *, d_model: int, d_attn_z: int) -> int:
    """Return the numbers per token of a stream: the heads side by side for ``attn_z``, the residual's width else."""
    return d_attn_z if stream == "attn_z" else d_model


def locate(
    text: "torch.nn.Module", architecture_name: str, widths: Mapping[str, int], points: Iterable[str]
) -> list[tuple[str, "torch.nn.Module", Tap]]:
    """Return each point's name, module and tap, in the order of the computation.

    ``widths`` are those that the config gives. Raises ``BadInputError`` where a device holds only a slice of one of
    the tensors.
    """
    rows, found = architecture(architecture_name), []
    for point in sorted(map(HookPoint.parse, points), key=lambda p: (p.layer, STREAMS.index(p.stream))):
        path, tap = rows.tap(point)
        module = text.get_submodule(path)
        if point.stream == "attn_z":
            _require_whole(str(point), module, widths[str(point)])
        found.append((str(point), module, tap))
    return found


def _require_whole(point: str, o_proj: Any, width: int) -> None:
    # Tensor parallelism gives each rank some of the heads; torch's DTensor says its global shape.
    weight = o_proj.weight
    n_inputs = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[-1]
    if n_inputs != width:
        raise BadInputError(
            f"{point} is cut by tensor parallelism: o_proj reads {n_inputs} of its {width} channels here; load the "
            "model whole (device_map spreads its layers over several GPUs), or leave attn_z out"
        )


def attach(
    module: "torch.nn.Module", tap: Tap, see: Callable[["torch.Tensor"], "torch.Tensor | None"]
) -> "RemovableHandle":
    """Call ``see`` with the tap's tensor in every forward pass; a tensor that it returns takes the place of that one.

    Of a module that returns a tuple, as blocks do in transformers 4, the tensor is the first item.
    """

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return see(output)
        new = see(output[0])
        return None if new is None else (new, *output[1:])

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = see(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    if tap.side == "output":
        return module.register_forward_hook(after)
    return module.register_forward_pre_hook(before, with_kwargs=True)
