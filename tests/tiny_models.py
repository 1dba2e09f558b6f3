"""Tiny models of every architecture that actlake knows, and of every size of Gemma 3, with weights by formula."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_gemma
import torch
import transformers
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tiny:
    """A model class, the config of its text model, and the numbers that differ from the others'."""

    architecture: str
    config: str
    sizes: Mapping[str, Any]


def _sizes(d: int, heads: int, keys: int, head_dim: int, **changes: Any) -> dict[str, Any]:
    heads_and_width = {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head_dim}
    return {"hidden_size": d, "intermediate_size": 2 * d} | heads_and_width | changes


_CAUSAL, _WHOLE, _TEXT = "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "Gemma3TextConfig"
# Gemma 3's own head sizes, query scaling and ratio of widths (attn_z / d: 1.6, 0.89, 0.8, 1.07, 0.76).
MODELS = {
    "gemma3-270m": Tiny(_CAUSAL, _TEXT, _sizes(160, 1, 1, 256, query_pre_attn_scalar=256)),
    "gemma3-1b": Tiny(_CAUSAL, _TEXT, _sizes(288, 1, 1, 256, query_pre_attn_scalar=256)),
    "gemma3-4b": Tiny(_WHOLE, _TEXT, _sizes(320, 1, 1, 256, query_pre_attn_scalar=256)),
    "gemma3-12b": Tiny(_WHOLE, _TEXT, _sizes(240, 1, 1, 256, query_pre_attn_scalar=256)),
    "gemma3-27b": Tiny(_WHOLE, _TEXT, _sizes(336, 2, 1, 128, query_pre_attn_scalar=168)),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", _sizes(48, 4, 2, 16, query_pre_attn_scalar=24)),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", _sizes(48, 2, 1, 32)),
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _sizes(48, 4, 2, 12)),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", _sizes(48, 4, 2, 16)),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", _sizes(48, 4, 2, 12)),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", _sizes(48, 4, 2, 16)),
}
N_LAYERS = 3


def build(name: str) -> PreTrainedModel:
    """Return a float32 model of three blocks in evaluation mode."""
    tiny = MODELS[name]
    common = {"vocab_size": tiny_gemma.VOCABULARY, "num_hidden_layers": N_LAYERS, "max_position_embeddings": 64}
    windows = {"sliding_window": 6} if name.startswith(("gemma2", "gemma3", "mistral")) else {}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text: Any = getattr(transformers, tiny.config)(**common, **windows, **tokens, **tiny.sizes)
    config = tiny_gemma.multimodal(text) if tiny.architecture == _WHOLE else text
    made: Any = getattr(transformers, tiny.architecture)(config)
    model: PreTrainedModel = made.eval()
    with torch.no_grad():
        tiny_gemma.fill(model)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and "Gemma" not in type(module).__name__:
                # Gemma's gain is 1 + weight, the others' is the weight.
                module.get_parameter("weight").add_(1)
    return model


def save(folder: Path, name: str) -> Path:
    """Write a model and its tokenizer in bfloat16, as ``save_pretrained`` does."""
    build(name).bfloat16().save_pretrained(folder)
    tiny_gemma.tokenizer().save_pretrained(folder)
    return folder
