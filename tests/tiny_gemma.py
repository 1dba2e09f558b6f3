"""Tiny Gemma 3 models of both classes whose weights are a formula, saved as a user's folder would be."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 96
N_LAYERS = 4
D_MODEL = 48
CONTEXT = 64

#: Head sizes whose heads side by side are wider and narrower than the residual, each with its own query scaling.
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128, "query_pre_attn_scalar": 168}
NARROW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 24}
CLASSES = {"Gemma3ForCausalLM": WIDE_HEADS, "Gemma3ForConditionalGeneration": NARROW_HEADS}


def text_config(**changes: Any) -> Gemma3TextConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": 80,
        "num_hidden_layers": N_LAYERS,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * (N_LAYERS // 2),
        "max_position_embeddings": CONTEXT,
    }
    return Gemma3TextConfig(**{**sizes, **WIDE_HEADS, **changes})


def build(class_name: str) -> PreTrainedModel:
    """Return a float32 model whose weights are a formula."""
    text = text_config(**CLASSES[class_name])
    model: PreTrainedModel
    if class_name == "Gemma3ForCausalLM":
        model = Gemma3ForCausalLM(text)
    else:
        model = Gemma3ForConditionalGeneration(multimodal(text))
    fill(model)
    return model


def multimodal(text: Gemma3TextConfig) -> Gemma3Config:
    """Return the config of the class that reads pictures too, with next to nothing for them."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    patches = {"image_size": 8, "patch_size": 4}
    return Gemma3Config(text_config=text, vision_config={**vision, **patches}, mm_tokens_per_image=1)


def fill(model: PreTrainedModel) -> None:
    """Make every parameter a sine of its index, of a size that keeps activations near 1."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            index = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            size = 0.3 if name.endswith("norm.weight") else 0.15
            parameter.copy_(size * torch.sin(index * (0.7 + 0.01 * i) + i))


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    words = {f"w{i}": i for i in range(len(special), VOCABULARY)}
    backend = Tokenizer(WordLevel({**special, **words}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def save(folder: Path, class_name: str = "Gemma3ForCausalLM") -> Path:
    """Write a model and its tokenizer in bfloat16, as ``save_pretrained`` does."""
    build(class_name).bfloat16().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def token_ids(n_rows: int, n_tokens: int) -> torch.Tensor:
    """Return int64 [n_rows, n_tokens] ids, BOS first."""
    index = torch.arange(n_rows * n_tokens).reshape(n_rows, n_tokens)
    ids = 4 + index * 37 % (VOCABULARY - 4)
    ids[:, 0] = 2
    return ids
