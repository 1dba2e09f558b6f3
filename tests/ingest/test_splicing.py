"""Functions in a running model: where they may go, what they see, what they must return."""

from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import torch
from transformers import Gemma3ForConditionalGeneration

import actlake.ingest
from actlake.ingest import splice
from actlake.ingest.capture import Capture
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import resolve_model
from actlake.storage.errors import BadInputError, UnknownNameError

IDS = tiny_gemma.token_ids(2, 12)
CLASS = "Gemma3ForConditionalGeneration"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(resolve_model(str(tiny_gemma.save(tmp_path_factory.mktemp("model"), CLASS))), head=True)


def test_a_transcoder_reads_one_point_and_writes_another(model: LoadedModel) -> None:
    seen: list[torch.Tensor] = []

    def transcoder(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x.float() * 2

    old = Capture(model, ["layers.2.mlp_in"])(IDS)["layers.2.mlp_in"]
    with splice(model, {("layers.2.mlp_in", "layers.2.mlp_out"): transcoder}):
        acts = Capture(model, ["layers.2.*"])(IDS)
        model.logits(IDS)
    assert len(seen) == 2
    assert torch.equal(seen[0], old)
    assert torch.equal(acts["layers.2.mlp_in"], old)
    assert torch.equal(acts["layers.2.mlp_out"], old * 2)
    assert torch.equal(acts["layers.2.resid_post"], acts["layers.2.resid_mid"] + old * 2)


def test_functions_see_what_earlier_ones_have_written(model: LoadedModel) -> None:
    functions: dict[Any, Any] = {
        ("layers.0.resid_mid", "layers.1.mlp_out"): lambda x: x + 1,
        "layers.0.resid_mid": lambda x: torch.full_like(x, 3.0),
        "layers.1.mlp_out": lambda x: x,
    }
    with (
        pytest.raises(BadInputError, match=r"layers\.1\.mlp_out would be written by two functions"),
        splice(model, functions),
    ):
        pass
    del functions["layers.1.mlp_out"]
    with splice(model, functions):
        acts = Capture(model, ["layers.1.mlp_out"])(IDS)
    assert (acts["layers.1.mlp_out"] == 4).all()


def test_foreign_names_and_a_model_of_transformers_will_do(tmp_path: Path) -> None:
    # Not in bfloat16, where load_model may choose other kernels.
    model = load_model(resolve_model(str(tiny_gemma.save(tmp_path, CLASS))), dtype="float32", head=True)
    clean, whole = model.logits(IDS), Gemma3ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(whole(input_ids=IDS).logits, clean)
        with splice(whole, {"gs2:1/attn_out": torch.zeros_like}):
            spliced = whole(input_ids=IDS).logits
    with splice(model, {"tl:blocks.1.attn.hook_z": torch.zeros_like}):
        assert torch.equal(model.logits(IDS), spliced)
    assert not torch.equal(spliced, clean)


@pytest.mark.parametrize("stream", ["attn_z", "resid_mid", "mlp_in", "resid_post"])
def test_gradients_flow_through_a_function(stream: str) -> None:
    whole: Any = tiny_gemma.build(CLASS)
    whole.eval()
    scale = torch.ones((), requires_grad=True)
    with splice(whole, {f"layers.1.{stream}": lambda x: x * x * scale}):
        whole(input_ids=IDS).logits.float().square().mean().backward()
        assert scale.grad is not None
        found = float(scale.grad)
        losses = []
        with torch.no_grad():
            # Small enough for curvature, large enough for float32: CPUs round the losses by 1e-6.
            for value in (1.005, 0.995):
                scale.fill_(value)
                losses.append(float(whole(input_ids=IDS).logits.double().square().mean()))
    assert found == pytest.approx((losses[0] - losses[1]) / 0.01, rel=5e-2)


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        ({"layers.4.mlp_in": torch.clone}, UnknownNameError, r"the layers are 0\.\.3"),
        ({"layers.*.mlp_in": torch.clone}, BadInputError, r"is 4 hook points; a function goes to one"),
        ({"gs2:1/transcoder": torch.clone}, BadInputError, r"is 2 hook points; .* e\.g\. 'layers\.1\.mlp_in'"),
        ({("layers.2.mlp_in", "layers.1.mlp_out"): torch.clone}, BadInputError, "reads what is computed after"),
        ({("layers.1.mlp_out", "layers.1.mlp_in"): torch.clone}, BadInputError, "reads what is computed after"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_runs(
    model: LoadedModel, functions: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), splice(model, functions):
        pass


def test_a_result_of_another_shape_is_refused_and_the_model_is_left_as_it_was(model: LoadedModel) -> None:
    clean = model.logits(IDS)
    with (
        pytest.raises(BadInputError, match=r"layers\.1\.attn_z returned \[2, 12, 48\], not \[2, 12, 32\]"),
        splice(model, {("layers.1.resid_pre", "layers.1.attn_z"): lambda x: x}),
    ):
        model.logits(IDS)
    assert torch.equal(model.logits(IDS), clean)


def test_logits_need_the_head(model: LoadedModel, tmp_path: Path) -> None:
    text = load_model(resolve_model(str(tiny_gemma.save(tmp_path, CLASS))))
    with pytest.raises(BadInputError, match=r"load_model\(\.\.\., head=True\) gives logits"):
        text.logits(IDS)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = actlake.ingest.frobnicate
