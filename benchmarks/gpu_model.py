"""Gemma 3 at its published sizes with random weights, what a forward pass of it costs, and how fast it runs alone.

A pass of random weights takes the time of a trained one's. Nothing is read from disk, and the weights are made where
they run: a model of 12B has no 24 GB copy in host memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Gemma3TextConfig, Gemma3TextModel

from actlake.ingest.gemma3 import GEMMA_3, Gemma3Size
from actlake.ingest.loading import LoadedModel
from actlake.ingest.models import ModelShape

_ARCHITECTURE = "Gemma3ForCausalLM"

SIZES = {name: GEMMA_3[f"google/gemma-3-{name}-pt"] for name in ("1b", "4b", "12b")} | {
    "tiny": Gemma3Size(n_layers=4, d_model=64, n_heads=2, n_kv_heads=1, head_dim=32, d_ff=128, multimodal=False)
}
#: Tokens of a batch. Launching the kernels of a small model takes longer than a small batch runs.
BATCH_TOKENS = {"1b": 16_384, "4b": 8_192, "12b": 4_096, "tiny": 256}

#: Dense bf16 TFLOP/s by what the GPU's name holds, first match, from the vendor's data sheets.
_PEAKS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
)


def window_of(size: Gemma3Size) -> int:
    """Return the tokens that a layer of sliding attention sees; five of six layers are such."""
    return 1024 if size.multimodal else 512


def shape_of(size: Gemma3Size) -> ModelShape:
    """Return the sizes as a loaded model has them."""
    return ModelShape(
        architecture=_ARCHITECTURE,
        n_layers=size.n_layers,
        d_model=size.d_model,
        d_attn_z=size.n_heads * size.head_dim,
        d_kv=size.n_kv_heads * size.head_dim,
        d_ff=size.d_ff,
        context_length=size.context_length,
        vocab_size=size.vocab_size,
    )


def random_model(size: Gemma3Size, device: str, seed: int = 0) -> LoadedModel:
    """Return the text model of that size in bf16 with random weights, made on its device."""
    config = Gemma3TextConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_kv_heads,
        head_dim=size.head_dim,
        query_pre_attn_scalar=size.head_dim,
        max_position_embeddings=size.context_length,
        sliding_window=window_of(size),
    )
    place = torch.device(device)
    torch.manual_seed(seed)
    with place:
        text: Any = Gemma3TextModel._from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    return LoadedModel(
        text=text.requires_grad_(False).eval(),
        shape=shape_of(size),
        device=place,
        dtype=torch.bfloat16,
        kernels="native",
    )


def flops_per_token(size: Gemma3Size, context: int) -> float:
    """Return the floating-point operations of a token's forward pass without logits, at a mean over its positions.

    2 for each weight of a linear layer, and 4 x heads x head size for each key that a token sees: itself and those
    before it, in layers of sliding attention at most the window. Norms, rotations and the embedding are left out.
    """
    d_heads, d_keys = size.n_heads * size.head_dim, size.n_kv_heads * size.head_dim
    n_weights = size.d_model * (2 * d_heads + 2 * d_keys + 3 * size.d_ff)
    n_full = size.n_layers // 6
    n_seen = n_full * _mean_seen(context, context) + (size.n_layers - n_full) * _mean_seen(context, window_of(size))
    return 2.0 * n_weights * size.n_layers + 4.0 * d_heads * n_seen


def _mean_seen(context: int, window: int) -> float:
    return sum(min(position + 1, window) for position in range(context)) / context


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Dense bf16 TFLOP/s that a share of the peak is of, and where the number is from."""

    tflops: float
    source: str


def peak_of(device: str, asked: float | None, measured: float) -> Peak:
    """Return the peak that was asked for, else the data sheet's by the GPU's name, else the measured product's rate."""
    if asked is not None:
        return Peak(tflops=asked, source="--peak-tflops")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    listed = next((tflops for part, tflops in _PEAKS if part in name), None)
    if listed is not None:
        return Peak(tflops=listed, source=f"data sheet of {name}")
    return Peak(tflops=measured, source="the product measured here")


def synchronize(device: str) -> None:
    """Wait until the device has done all that was queued."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def product_tflops(device: str, seconds: float) -> float:
    """Return the TFLOP/s of products of two square bf16 matrices of random numbers; zeros would run faster."""
    n = 8192 if device.startswith("cuda") else 128
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * n**3 * _rate(lambda: torch.mm(a, b), device, seconds) / 1e12


def bare_tokens_per_s(model: LoadedModel, batch_tokens: int, context: int, seconds: float) -> float:
    """Return the tokens a second of the text model alone: no hooks, no logits, token ids on the device already."""
    n_rows = max(1, batch_tokens // context)
    ids_BT = torch.randint(10, model.shape.vocab_size, (n_rows, context), device=model.device)

    def run() -> None:
        with torch.inference_mode():
            model.text(input_ids=ids_BT, use_cache=False)

    return n_rows * context * _rate(run, str(model.device), seconds)


def _rate(run: Callable[[], object], device: str, seconds: float) -> float:
    """Return how often a second something runs, over about so many seconds, after three times that do not count."""
    for _ in range(3):
        run()
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    n_runs = max(3, int(seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(n_runs):
        run()
    synchronize(device)
    return n_runs / (time.perf_counter() - start)
