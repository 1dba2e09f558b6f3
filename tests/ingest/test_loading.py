"""How a model may be run: attention, compiler, several devices; what cannot be used is refused with the reason."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import tiny_models
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from actlake.ingest import splice
from actlake.ingest.capture import Capture
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import ModelRef, resolve_model
from actlake.storage.errors import BadInputError, MissingExtraError

IDS = tiny_gemma.token_ids(2, 16)


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return resolve_model(str(tiny_gemma.save(tmp_path_factory.mktemp("model"))))


def attention(model: LoadedModel) -> str:
    text: Any = model.text
    return str(text.config._attn_implementation)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_eager_attention_is_another_way_to_nearly_the_same_numbers(ref: ModelRef) -> None:
    usual, eager = load_model(ref, dtype="float32"), load_model(ref, dtype="float32", attn_implementation="eager")
    first, second = (Capture(model, ["layers.3.resid_post"])(IDS)["layers.3.resid_post"] for model in (usual, eager))
    assert relative(second, first) < 1e-4
    assert (usual.kernels, eager.kernels) == ("native", "native, eager attention")
    assert (attention(usual), attention(eager)) == ("sdpa", "eager")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("flash_attention_2", "runs on GPUs only, not on 'cpu'; use 'sdpa'"),
        ("flash_attention", "is not known; did you mean 'flash_attention_[23]'"),
        ("someone/kernel", "is not known; valid names: eager, flash_attention_2"),
    ],
)
def test_attention_that_cannot_be_used_says_why(ref: ModelRef, asked: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        load_model(ref, attn_implementation=asked)


def test_a_cap_on_attention_scores_is_never_left_out(tmp_path: Path) -> None:
    ref = resolve_model(str(tiny_models.save(tmp_path, "gemma2")))
    assert attention(load_model(ref)) == "eager"
    assert load_model(ref, attn_implementation="eager").kernels == load_model(ref).kernels
    with pytest.raises(BadInputError, match="would leave out this architecture's cap on attention scores; use 'eager'"):
        load_model(ref, attn_implementation="sdpa")


# --- several devices ----------------------------------------------------------------------------------------------


def test_layers_on_several_devices_give_the_same_bits(ref: ModelRef) -> None:
    expected = Capture(load_model(ref), ["*"])(IDS)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", *(f"model.layers.{layer}" for layer in range(4))]
    for device_map in ("auto", dict.fromkeys([*parts, "lm_head"], "cpu")):
        model = load_model(ref, device_map=device_map, head=True)
        assert model.device == torch.device("cpu")
        found = Capture(model, ["*"])(IDS)
        assert all(torch.equal(found[point], tensor) for point, tensor in expected.items())
        with splice(model, {"layers.2.attn_z": torch.clone}):
            assert torch.equal(model.logits(IDS), load_model(ref, head=True).logits(IDS))


def test_layers_that_no_gpu_holds_are_refused(ref: ModelRef, tmp_path: Path) -> None:
    left = {"": "cpu"} | {"model.layers.3": "meta"}
    with pytest.raises(BadInputError, match=r"left layers on cpu, meta.*give the worker more of them"):
        load_model(ref, device_map=left)


def test_device_map_names_the_package_that_it_needs(ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("actlake.ingest.loading.find_spec", lambda name: None if name == "accelerate" else found(name))
    with pytest.raises(MissingExtraError, match=r"needs accelerate, .*pip install 'actlake\[multigpu\]'"):
        load_model(ref, device_map="auto")


@pytest.fixture
def two_ranks() -> Iterator[Any]:
    """A device mesh of two, of which this process is the first and the other one answers nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_attn_z_is_never_a_slice(ref: ModelRef, two_ranks: Any) -> None:
    model = load_model(ref)
    o_proj: Any = model.text.get_submodule("layers.1.self_attn.o_proj")
    mine = DTensor.from_local(o_proj.weight.detach().chunk(2, dim=1)[0], two_ranks, [Shard(1)])
    whole_shape, o_proj.weight = o_proj.weight.shape, torch.nn.Parameter(mine, requires_grad=False)
    assert o_proj.weight.shape == whole_shape
    with pytest.raises(
        BadInputError, match=r"layers\.1\.attn_z is cut by tensor parallelism: o_proj reads 128 of its 256"
    ):
        Capture(model, ["layers.1.attn_z"])
    with pytest.raises(BadInputError, match="leave attn_z out"), splice(model, {"layers.1.attn_z": torch.clone}):
        pass
    Capture(model, ["layers.0.attn_z", "layers.1.attn_out"])


# --- the compiler -------------------------------------------------------------------------------------------------


@pytest.mark.slow
# Torch's compiler warns of what it imports itself.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_parts_leave_every_hook_point_in_sight(ref: ModelRef) -> None:
    plain, model = load_model(ref, dtype="float32"), load_model(ref, dtype="float32", compiled=True)
    assert model.kernels == "native, compiled"
    expected, found = Capture(plain, ["*"])(IDS), Capture(model, ["*"])(IDS)
    for point, tensor in expected.items():
        assert relative(found[point], tensor) < 1e-4, point
    some = ["layers.0.mlp_in", "layers.3.resid_post"]
    again = Capture(model, some)(IDS)
    assert all(torch.equal(again[point], found[point]) for point in some)
    with splice(model, {"layers.0.mlp_in": torch.zeros_like}):
        assert (Capture(model, ["layers.0.mlp_out"])(IDS)["layers.0.mlp_out"] == 0).all()


def test_an_absent_compiler_is_named(ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("raised:\nno compiler found\n\nSet TORCH_LOGS")

    monkeypatch.setattr("actlake.ingest.compiling._compiled", lambda _function: fail)
    with pytest.raises(
        BadInputError, match=r"'cpu': raised: no compiler found; install a C\+\+ compiler, or leave it out"
    ):
        load_model(ref, compiled=True)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    with pytest.raises(BadInputError, match="needs a newer torch than"):
        load_model(ref, compiled=True)
