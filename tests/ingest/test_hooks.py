"""Hook points, widths and presets follow from the model's shape alone."""

from typing import Any

import pytest

from actlake.ingest.hooks import ARCHITECTURES, Architecture, Tap, architecture, stream_width
from actlake.ingest.models import ModelShape
from actlake.ingest.presets import PRESETS, SUBSET_LAYERS, expand_points
from actlake.storage.errors import BadInputError, ModelAccessError, UnknownNameError
from actlake.storage.hookpoints import STREAMS


def shape(n_layers: int = 18, d_model: int = 640, **changes: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "d_attn_z": 1024,
        "d_kv": 256,
        "d_ff": 2048,
        "context_length": 32_768,
        "vocab_size": 262_144,
    }
    return ModelShape(architecture="Gemma3ForCausalLM", n_layers=n_layers, d_model=d_model, **{**sizes, **changes})


def test_widths_list_every_point_in_layer_then_stream_order() -> None:
    widths = shape().widths()
    assert list(widths) == [f"layers.{layer}.{stream}" for layer in range(18) for stream in STREAMS]
    assert {point for point, width in widths.items() if width == 1024} == {f"layers.{i}.attn_z" for i in range(18)}
    assert {width for point, width in widths.items() if not point.endswith("attn_z")} == {640}
    assert stream_width("attn_z", d_model=3, d_attn_z=5) == 5


def test_a_shape_with_an_empty_size_is_refused() -> None:
    with pytest.raises(ModelAccessError, match=r"\{'d_ff': 0\}"):
        shape(d_ff=0)


def test_an_unknown_architecture_says_which_are_known_and_how_to_add_one() -> None:
    with pytest.raises(ModelAccessError, match=r"'GPT2LMHeadModel' is unknown; known are Gemma3.*add a row"):
        architecture("GPT2LMHeadModel")
    assert {"Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "LlamaForCausalLM"} < set(ARCHITECTURES)


def test_an_architecture_must_place_every_stream() -> None:
    with pytest.raises(ModelAccessError, match="a tap for each of"):
        Architecture(text="model", taps={"resid_post": Tap(module="", side="output")})


@pytest.mark.parametrize(
    ("preset", "layers", "streams"),
    [
        ("gemma-scope-2", range(18), ("attn_z", "mlp_in", "mlp_out", "resid_post")),
        ("gemma-scope-2-subset", (5, 9, 12, 15), ("attn_z", "mlp_in", "mlp_out", "resid_post")),
        ("clt", range(18), ("mlp_in", "mlp_out")),
        ("crosscoder", (5, 9, 12, 15), ("resid_post",)),
    ],
)
def test_presets_select_their_layers_and_streams(preset: str, layers: Any, streams: tuple[str, ...]) -> None:
    expected = tuple(f"layers.{layer}.{stream}" for layer in layers for stream in streams)
    assert expand_points(None, preset, shape()) == expected
    assert preset in PRESETS


def test_subset_layers_exist_for_every_gemma_3_size() -> None:
    for (n_layers, d_model), layers in SUBSET_LAYERS.items():
        assert expand_points(None, "crosscoder", shape(n_layers, d_model)) == tuple(
            f"layers.{layer}.resid_post" for layer in layers
        )
    assert sorted(n_layers for n_layers, _ in SUBSET_LAYERS) == [18, 26, 34, 48, 62]


def test_listed_points_and_wildcards_come_in_the_models_order() -> None:
    found = expand_points(["layers.9.resid_post", "layers.*.mlp_in", "layers.9.attn_z"], None, shape(n_layers=10))
    assert found[-3:] == ("layers.9.attn_z", "layers.9.mlp_in", "layers.9.resid_post")
    assert len(found) == 12


@pytest.mark.parametrize(
    ("points", "preset", "error", "message"),
    [
        (None, None, BadInputError, "not neither"),
        (["layers.0.resid_post"], "clt", BadInputError, "not both"),
        (None, "gemma-scope2", UnknownNameError, "did you mean 'gemma-scope-2'"),
        (["layers.18.resid_post"], None, UnknownNameError, r"the layers are 0\.\.17"),
        (["layers.3.resid_pst"], None, UnknownNameError, r"did you mean 'layers\.3\.resid_p"),
        ([], None, BadInputError, "no hook point given"),
    ],
)
def test_bad_selections_name_the_remedy(
    points: list[str] | None, preset: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        expand_points(points, preset, shape())


def test_a_subset_preset_on_another_model_says_what_to_write_instead() -> None:
    with pytest.raises(BadInputError, match=r"4 layers and width 48 .*hook_points = \['layers\.<layer>\.resid_post'\]"):
        expand_points(None, "crosscoder", shape(4, 48))
