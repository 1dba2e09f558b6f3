"""Where each stream lives in a model, as data: one row for each architecture.

To add a model family, add its class to ``ARCHITECTURES``: the path of the inner text model, and for each stream the
module inside a block and the side of it that is the stream's tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from actlake.storage.errors import ModelAccessError
from actlake.storage.hookpoints import STREAMS, HookPoint


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One side of a module: ``module`` is a path inside a block, empty for the block itself."""

    module: str
    side: Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What actlake knows of a model class; ``text`` is the path of the module that embeds tokens and runs the blocks.

    ``no_float16`` says why float16 cannot hold the activations; empty where it can.
    """

    text: str
    taps: Mapping[str, Tap]
    layers: str = "layers"
    no_float16: str = ""

    def __post_init__(self) -> None:
        if set(self.taps) != set(STREAMS):
            raise ModelAccessError(f"an architecture needs a tap for each of {STREAMS}, not {tuple(self.taps)}")

    def tap(self, point: HookPoint) -> tuple[str, Tap]:
        """Return the path, inside the text model, of the module to hook, and the tap."""
        tap = self.taps[point.stream]
        return f"{self.layers}.{point.layer}.{tap.module}".rstrip("."), tap


_GEMMA_3_TAPS = {
    "resid_pre": Tap(module="", side="input"),
    "attn_z": Tap(module="self_attn.o_proj", side="input"),
    "attn_out": Tap(module="post_attention_layernorm", side="output"),
    "resid_mid": Tap(module="pre_feedforward_layernorm", side="input"),
    "mlp_in": Tap(module="pre_feedforward_layernorm", side="output"),
    "mlp_out": Tap(module="post_feedforward_layernorm", side="output"),
    "resid_post": Tap(module="", side="output"),
}
# Measured: layer 8 of the 270M exceeds it on ordinary text.
_GEMMA_3_NO_FLOAT16 = "Gemma 3's residual stream exceeds float16's largest value, 65,504"

ARCHITECTURES: Mapping[str, Architecture] = {
    "Gemma3ForCausalLM": Architecture(text="model", taps=_GEMMA_3_TAPS, no_float16=_GEMMA_3_NO_FLOAT16),
    "Gemma3ForConditionalGeneration": Architecture(
        text="model.language_model", taps=_GEMMA_3_TAPS, no_float16=_GEMMA_3_NO_FLOAT16
    ),
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
