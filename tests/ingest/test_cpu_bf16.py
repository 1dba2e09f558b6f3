"""Linear layers through float32 are bfloat16 linear layers, and are used only where they help."""

from pathlib import Path

import pytest
import tiny_gemma
import torch
from torch import nn

from actlake.ingest import cpu_bf16
from actlake.ingest.capture import Capture
from actlake.ingest.loading import load_model
from actlake.ingest.models import resolve_model


def linear(d_in: int, d_out: int, *, bias: bool) -> nn.Linear:
    """Return a bfloat16 layer whose weights and bias are multiples of 1/8 below 4: all sums are exact in float32."""
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_((torch.arange(d_in * d_out).reshape(d_out, d_in) * 7 % 61 - 30) / 8)
        if bias:
            layer.bias.copy_((torch.arange(d_out) * 5 % 17 - 8) / 8)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_the_result_is_the_exact_sum_rounded_once(bias: bool) -> None:
    layer = linear(96, 40, bias=bias)
    x = ((torch.arange(3 * 5 * 96).reshape(3, 5, 96) * 11 % 127 - 63) / 16).to(torch.bfloat16)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0.0)
    # Bfloat16's 8 bits do round here.
    assert not torch.equal(exact.to(torch.bfloat16).double(), exact)
    with torch.inference_mode():
        found = cpu_bf16.WidenedLinear(layer)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_only_bfloat16_linear_layers_are_replaced() -> None:
    kept = nn.Linear(4, 4)
    root = nn.ModuleDict({"a": linear(8, 8, bias=True), "b": nn.ModuleList([linear(8, 4, bias=False), kept])})
    root["embedding"] = nn.Embedding(10, 8, dtype=torch.bfloat16)
    assert cpu_bf16.widen_linears(root) == 2
    kinds = [type(module).__name__ for module in root.modules()]
    assert kinds.count("WidenedLinear") == 2
    assert root["b"][1] is kept  # type: ignore[index]
    assert root["embedding"].weight.dtype == torch.bfloat16
    assert cpu_bf16.widen_linears(root) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma.save(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("fast", "dtype", "n_widened"),
    [(False, "bfloat16", 7 * tiny_gemma.N_LAYERS), (True, "bfloat16", 0), (False, "float32", 0)],
)
def test_a_model_is_widened_only_where_the_cpu_lacks_bfloat16(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fast: bool, dtype: str, n_widened: int
) -> None:
    monkeypatch.setattr(cpu_bf16, "has_fast_bf16", lambda: fast)
    model = load_model(resolve_model(str(folder)), dtype=dtype)
    widened = [module for module in model.text.modules() if isinstance(module, cpu_bf16.WidenedLinear)]
    assert len(widened) == n_widened
    assert model.describe()["kernels"] == ("bfloat16 linear layers in float32, rounded once" if n_widened else "native")


def test_both_ways_of_multiplying_agree_to_bfloat16_rounding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    for fast in (False, True):
        monkeypatch.setattr(cpu_bf16, "has_fast_bf16", lambda fast=fast: fast)
        model = load_model(resolve_model(str(folder)))
        captured.append(Capture(model, ["layers.*.resid_post"])(tiny_gemma.token_ids(2, 16)))
    widened, native = captured
    for point, tensor in widened.items():
        expected = native[point].double()
        assert (tensor.double() - expected).norm() <= 2e-2 * expected.norm(), point


def test_what_torch_says_of_this_cpu_is_a_plain_answer() -> None:
    assert cpu_bf16.has_fast_bf16() in (True, False)
