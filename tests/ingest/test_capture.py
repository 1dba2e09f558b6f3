"""Every stream is the tensor that its definition says, whatever else is captured, and nothing runs beyond it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import torch
from torch import nn

from actlake.ingest.capture import Capture
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import resolve_model
from actlake.storage.errors import BadInputError, ModelAccessError, UnknownNameError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_gemma.save(tmp_path_factory.mktemp(name), name) for name in tiny_gemma.CLASSES}


@pytest.fixture(params=tiny_gemma.CLASSES)
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    return load_model(resolve_model(str(folders[request.param])))


@pytest.fixture(params=tiny_gemma.CLASSES)
def model_f32(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LoadedModel:
    return load_model(resolve_model(str(folders[request.param])), dtype="float32")


def block(model: LoadedModel, layer: int) -> Any:
    layers: Any = model.text.layers
    return layers[layer]


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm as Gemma defines it: in float32, times 1 + weight, cast at the end."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scaled * (1.0 + weight.float())).to(x.dtype)


def plain_forward(model: LoadedModel, input_ids: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run the whole text model with hooks of the test's own; return all streams and the final-normed state."""
    seen: dict[str, torch.Tensor] = {}

    def keep_input(name: str) -> Any:
        return lambda _module, args: seen.__setitem__(name, args[0].clone())

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: seen.__setitem__(name, output.clone())

    handles = []
    for layer in range(model.shape.n_layers):
        this = block(model, layer)
        name = f"layers.{layer}"
        handles += [
            this.register_forward_pre_hook(keep_input(f"{name}.resid_pre")),
            this.self_attn.o_proj.register_forward_pre_hook(keep_input(f"{name}.attn_z")),
            this.post_attention_layernorm.register_forward_hook(keep_output(f"{name}.attn_out")),
            this.pre_feedforward_layernorm.register_forward_pre_hook(keep_input(f"{name}.resid_mid")),
            this.pre_feedforward_layernorm.register_forward_hook(keep_output(f"{name}.mlp_in")),
            this.post_feedforward_layernorm.register_forward_hook(keep_output(f"{name}.mlp_out")),
            this.register_forward_hook(keep_output(f"{name}.resid_post")),
        ]
    with torch.inference_mode():
        last: torch.Tensor = model.text(input_ids=input_ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return seen, last


def all_points(model: LoadedModel) -> list[str]:
    return list(model.shape.widths())


def test_all_streams_equal_a_plain_forward_bit_for_bit(model: LoadedModel) -> None:
    ids = tiny_gemma.token_ids(3, 20)
    captured = Capture(model, all_points(model))(ids)
    expected, _ = plain_forward(model, ids)
    assert list(captured) == all_points(model)
    for point, tensor in captured.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.shape == (3, 20, model.shape.widths()[point])
        assert torch.equal(tensor, expected[point]), point


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions 0, 1, ... on [B, heads, T, size]."""
    size = x.shape[-1]
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequency
    cos, sin = (torch.cat([f(angle)] * 2, dim=-1).float() for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def test_attn_z_is_the_heads_attention_side_by_side(model_f32: LoadedModel) -> None:
    model, n_tokens = model_f32, 16
    acts = Capture(model, all_points(model))(tiny_gemma.token_ids(2, n_tokens))
    heads = tiny_gemma.CLASSES[model.shape.architecture]
    size, n_heads, n_keys = heads["head_dim"], heads["num_attention_heads"], heads["num_key_value_heads"]
    distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
    for layer in range(model.shape.n_layers):
        attention = block(model, layer).self_attn
        theta, window = (10_000.0, 6) if layer % 2 == 0 else (1_000_000.0, n_tokens)
        x = normed(acts[f"layers.{layer}.resid_pre"], block(model, layer).input_layernorm.weight)
        query, key, value = (
            (x @ projection.weight.T).unflatten(-1, (n, size)).transpose(1, 2)
            for projection, n in ((attention.q_proj, n_heads), (attention.k_proj, n_keys), (attention.v_proj, n_keys))
        )
        query = rotated(normed(query, attention.q_norm.weight), theta)
        key = rotated(normed(key, attention.k_norm.weight), theta).repeat_interleave(n_heads // n_keys, dim=1)
        score = query @ key.transpose(-1, -2) / math.sqrt(heads["query_pre_attn_scalar"])
        score = score.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        z = score.softmax(-1) @ value.repeat_interleave(n_heads // n_keys, dim=1)
        found = acts[f"layers.{layer}.attn_z"]
        assert found.shape[-1] == n_heads * size != tiny_gemma.D_MODEL
        # Float32 sums in another order.
        torch.testing.assert_close(found, z.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-5)


def test_the_last_resid_post_is_before_the_final_norm(model: LoadedModel) -> None:
    ids = tiny_gemma.token_ids(2, 12)
    point = f"layers.{model.shape.n_layers - 1}.resid_post"
    found = Capture(model, [point])(ids)[point]
    _, final = plain_forward(model, ids)
    norm: Any = model.text.norm
    assert not torch.equal(found, final)
    assert torch.equal(normed(found, norm.weight), final)


def calls_during(model: LoadedModel, points: list[str]) -> list[str]:
    """Return the paths of the modules of the text model that were entered, in order."""
    entered: list[str] = []

    def note(path: str) -> Any:
        return lambda _module, _args: entered.append(path)

    handles = [module.register_forward_pre_hook(note(path)) for path, module in model.text.named_modules()]
    Capture(model, points)(tiny_gemma.token_ids(1, 8))
    for handle in handles:
        handle.remove()
    return entered


@pytest.mark.parametrize(
    ("stream", "last_entered"),
    [
        ("resid_pre", "layers.1"),
        ("attn_z", "layers.1.self_attn.o_proj"),
        ("attn_out", "layers.1.post_attention_layernorm"),
        ("resid_mid", "layers.1.pre_feedforward_layernorm"),
        ("mlp_in", "layers.1.pre_feedforward_layernorm"),
        ("mlp_out", "layers.1.post_feedforward_layernorm"),
        ("resid_post", "layers.1.post_feedforward_layernorm"),
    ],
)
def test_the_forward_stops_at_the_deepest_point(model: LoadedModel, stream: str, last_entered: str) -> None:
    entered = calls_during(model, ["layers.0.mlp_in", f"layers.1.{stream}"])
    assert entered[-1] == last_entered
    assert not [path for path in entered if path.startswith(("layers.2", "layers.3", "norm"))]


def hooks_on(module: nn.Module) -> Iterator[int]:
    for part in module.modules():
        yield len(part._forward_hooks) + len(part._forward_pre_hooks)


def test_hooks_are_gone_after_a_call_and_after_a_failure(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sum(hooks_on(model.text))
    capture = Capture(model, all_points(model))
    capture(tiny_gemma.token_ids(1, 8))
    assert sum(hooks_on(model.text)) == before

    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(block(model, 2).mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(tiny_gemma.token_ids(1, 8))
    assert sum(hooks_on(model.text)) == before


# Another batch shape sums in another order: one rounding of the dtype in a value, grown through four layers to 2e-6 to
# 1.2e-5 and 0.03 to 0.11, by the kernels of the CPU. An earlier token that is another changes values by their own size.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.3)])
def test_a_sequence_in_a_padded_batch_equals_the_sequence_alone(
    folders: dict[str, Path], dtype: str, tolerance: float
) -> None:
    for folder in folders.values():
        model = load_model(resolve_model(str(folder)), dtype=dtype)
        capture = Capture(model, all_points(model))
        batch = tiny_gemma.token_ids(4, 24)
        batch[2, 13:] = 0
        together, alone = capture(batch), capture(batch[2:3, :13])
        for point in all_points(model):
            a, b = together[point][2, :13].double(), alone[point][0].double()
            assert (a - b).norm() <= tolerance * b.norm(), point


def test_the_same_batch_shape_gives_the_same_bits_whoever_the_mates_are(model: LoadedModel) -> None:
    capture = Capture(model, all_points(model))
    one, other = tiny_gemma.token_ids(4, 24), tiny_gemma.token_ids(4, 24).flip(0)
    other[2] = one[2]
    first, second = capture(one), capture(other)
    assert all(torch.equal(first[point][2], second[point][2]) for point in all_points(model))
    assert not torch.equal(first["layers.0.resid_pre"], second["layers.0.resid_pre"])


def test_a_block_that_returns_a_tuple_is_understood(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, point = tiny_gemma.token_ids(1, 8), "layers.1.resid_post"
    expected = Capture(model, [point])(ids)[point]
    run = block(model, 1).forward
    monkeypatch.setattr(block(model, 1), "forward", lambda *args, **kwargs: (run(*args, **kwargs), None))
    assert torch.equal(Capture(model, [point])(ids)[point], expected)


def test_a_tensor_of_another_shape_than_the_config_says_is_refused(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = block(model, 1).forward
    monkeypatch.setattr(block(model, 1), "forward", lambda *args, **kwargs: run(*args, **kwargs)[..., :5])
    with pytest.raises(ModelAccessError, match=r"layers\.1\.resid_post gave .*\[1, 8, 5\], not .*\[1, 8, 48\]"):
        Capture(model, ["layers.1.resid_post"])(tiny_gemma.token_ids(1, 8))


def test_bad_ids_and_points_are_refused(model: LoadedModel) -> None:
    capture = Capture(model, ["layers.0.resid_post"])
    with pytest.raises(BadInputError, match=r"int64 \[B, T\], not torch.int32 \[1, 8\]"):
        capture(tiny_gemma.token_ids(1, 8).int())
    with pytest.raises(BadInputError, match=r"int64 \[B, T\], not torch.int64 \[8\]"):
        capture(tiny_gemma.token_ids(1, 8)[0])
    with pytest.raises(BadInputError, match="65 tokens exceed the model's 64"):
        capture(tiny_gemma.token_ids(1, 65))
    with pytest.raises(UnknownNameError, match=r"the layers are 0\.\.3"):
        Capture(model, ["layers.4.resid_post"])
