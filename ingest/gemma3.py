"""The sizes of the published Gemma 3 models, so that jobs can be written and checked before access is granted.

From the models' own config.json; the loaded model is checked against what it captures.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gemma3Size:
    """One size, base and chat alike."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    multimodal: bool

    @property
    def context_length(self) -> int:
        return 131_072 if self.multimodal else 32_768

    @property
    def vocab_size(self) -> int:
        return 262_208 if self.multimodal else 262_144


_SIZES = {
    "270m": Gemma3Size(n_layers=18, d_model=640, n_heads=4, n_kv_heads=1, head_dim=256, d_ff=2_048, multimodal=False),
    "1b": Gemma3Size(n_layers=26, d_model=1_152, n_heads=4, n_kv_heads=1, head_dim=256, d_ff=6_912, multimodal=False),
    "4b": Gemma3Size(n_layers=34, d_model=2_560, n_heads=8, n_kv_heads=4, head_dim=256, d_ff=10_240, multimodal=True),
    "12b": Gemma3Size(n_layers=48, d_model=3_840, n_heads=16, n_kv_heads=8, head_dim=256, d_ff=15_360, multimodal=True),
    "27b": Gemma3Size(
        n_layers=62, d_model=5_376, n_heads=32, n_kv_heads=16, head_dim=128, d_ff=21_504, multimodal=True
    ),
}

#: By Hub id; the base model of the smallest has no suffix.
GEMMA_3 = {
    f"google/gemma-3-{size}{suffix}": sizes
    for size, sizes in _SIZES.items()
    for suffix in (("", "-it") if size == "270m" else ("-pt", "-it"))
}
