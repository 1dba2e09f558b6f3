"""Every row of the hook table: each stream is what its equation says, and a function put in there is felt."""

from functools import cache
from typing import Any

import pytest
import tiny_gemma
import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel

from actlake.ingest import splice
from actlake.ingest.capture import Capture
from actlake.ingest.hooks import ARCHITECTURES
from actlake.ingest.loading import LoadedModel
from actlake.ingest.models import shape_of
from actlake.storage.hookpoints import STREAMS

IDS = tiny_gemma.token_ids(2, 16)
every_model = pytest.mark.parametrize("name", tiny_models.MODELS)


@cache
def built(name: str) -> PreTrainedModel:
    return tiny_models.build(name).bfloat16()


def loaded(name: str) -> LoadedModel:
    """The model as ``load_model`` gives it, but not from a file."""
    whole, architecture = built(name), tiny_models.MODELS[name].architecture
    text = whole.get_submodule(ARCHITECTURES[architecture].text)
    config: Any = whole.config.get_text_config()
    shape = shape_of(config.to_dict(), architecture)
    cpu = torch.device("cpu")
    return LoadedModel(text=text, shape=shape, device=cpu, dtype=torch.bfloat16, kernels="native", whole=whole)


@cache
def captured(name: str) -> dict[str, torch.Tensor]:
    return Capture(loaded(name), ["*"])(IDS)


def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """RMSNorm as the papers have it: Gemma scales by 1 + weight in float32, the others by the weight, rounded."""
    weight: torch.Tensor = norm.weight
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    if "Gemma" in type(norm).__name__:
        return (scaled * (1 + weight.float())).to(x.dtype)
    return weight * scaled.to(x.dtype)


def test_every_architecture_has_a_tiny_model() -> None:
    assert {tiny.architecture for tiny in tiny_models.MODELS.values()} == set(ARCHITECTURES)


@every_model
def test_each_stream_obeys_its_defining_equation_exactly(name: str) -> None:
    model, acts = loaded(name), captured(name)
    blocks: Any = model.text.layers
    sandwich = hasattr(blocks[0], "pre_feedforward_layernorm")
    embedding: Any = model.text.embed_tokens
    with torch.inference_mode():
        assert torch.equal(acts["layers.0.resid_pre"], embedding(IDS))
        for layer, block in enumerate(blocks):
            pre, z, attn_out, mid, mlp_in, mlp_out, post = (acts[f"layers.{layer}.{stream}"] for stream in STREAMS)
            attended, made = block.self_attn.o_proj(z), block.mlp(mlp_in)
            if sandwich:
                attended = normed(attended, block.post_attention_layernorm)
                made = normed(made, block.post_feedforward_layernorm)
            norm = block.pre_feedforward_layernorm if sandwich else block.post_attention_layernorm
            assert torch.equal(attn_out, attended)
            assert torch.equal(mid, pre + attn_out)
            assert torch.equal(mlp_in, normed(mid, norm))
            assert torch.equal(mlp_out, made)
            assert torch.equal(post, mid + mlp_out)
            if layer:
                assert torch.equal(pre, acts[f"layers.{layer - 1}.resid_post"])
        final: Any = model.text.norm
        last = acts[f"layers.{len(blocks) - 1}.resid_post"]
        assert torch.equal(normed(last, final), model.text(input_ids=IDS, use_cache=False).last_hidden_state)


@every_model
def test_attn_z_is_as_wide_as_the_heads(name: str) -> None:
    sizes, z = tiny_models.MODELS[name].sizes, captured(name)["layers.1.attn_z"]
    n_heads, head_dim = sizes["num_attention_heads"], sizes["head_dim"]
    assert z.shape == (2, 16, n_heads * head_dim)
    # The first token attends to itself alone: its z is its value vector, once for each head of a group.
    model = loaded(name)
    layers: Any = model.text.layers
    block = layers[1]
    with torch.inference_mode():
        x = normed(captured(name)["layers.1.resid_pre"], block.input_layernorm)
        value = block.self_attn.v_proj(x)[:, 0].unflatten(-1, (-1, head_dim))
    expected = value.repeat_interleave(n_heads // sizes["num_key_value_heads"], dim=1)
    assert torch.equal(z[:, 0], expected.flatten(1))


# --- splices ------------------------------------------------------------------------------------------------------


def logits(name: str) -> torch.Tensor:
    return loaded(name).logits(IDS)


@every_model
def test_the_identity_changes_no_bit_of_the_logits_at_any_stream(name: str) -> None:
    model, clean = loaded(name), logits(name)
    for stream in STREAMS:
        for layer in range(tiny_models.N_LAYERS):
            with splice(model, {f"layers.{layer}.{stream}": lambda x: x}):
                assert torch.equal(logits(name), clean), stream
    with splice(model, {f"layers.1.{stream}": lambda x: x.clone() for stream in STREAMS}):
        assert torch.equal(logits(name), clean)
    with splice(built(name), {("layers.1.mlp_in", "layers.1.mlp_out"): lambda x: x * 0}):
        assert not torch.equal(logits(name), clean)
    assert torch.equal(logits(name), clean)


@every_model
def test_a_new_value_takes_the_place_of_the_old_one_in_every_later_stream(name: str) -> None:
    model, old = loaded(name), captured(name)
    blocks: Any = model.text.layers
    for number, stream in enumerate(STREAMS):
        point = f"layers.1.{stream}"
        new = (old[point] * 0.5 + 0.25).bfloat16()
        with splice(model, {point: lambda x, new=new: new.float()}):  # type: ignore[misc]
            acts = Capture(model, ["*"])(IDS)
        pre, z, attn_out, mid, mlp_in, mlp_out, post = (acts[f"layers.1.{stream}"] for stream in STREAMS)
        assert torch.equal(acts[point], new)
        for earlier in STREAMS[:number]:
            assert torch.equal(acts[f"layers.1.{earlier}"], old[f"layers.1.{earlier}"]), (stream, earlier)
        # What is computed from the new value is computed from it, and from nothing of the old one.
        if stream != "resid_mid":
            assert torch.equal(mid, pre + attn_out)
        if stream not in ("resid_post", "mlp_out"):
            made = _mlp(blocks[1], mlp_in)
            assert torch.equal(mlp_out, made)
        if stream != "resid_post":
            assert torch.equal(post, mid + mlp_out), stream
        assert torch.equal(acts["layers.2.resid_pre"], post)
        assert z.shape == old["layers.1.attn_z"].shape


def _mlp(block: nn.Module, mlp_in: torch.Tensor) -> torch.Tensor:
    made: Any = block.mlp
    with torch.inference_mode():
        out: torch.Tensor = made(mlp_in)
        if hasattr(block, "post_feedforward_layernorm"):
            out = normed(out, block.post_feedforward_layernorm)
    return out
