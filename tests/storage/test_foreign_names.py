import pytest

from actlake.storage.errors import UnknownNameError
from actlake.storage.foreign_names import foreign_names, translate
from actlake.storage.hookpoints import STREAMS, expand

NAMES = [f"layers.{layer}.{stream}" for layer in range(12) for stream in STREAMS]


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("gs2:9/attn_out", ("layers.9.attn_z",)),
        ("gs2:9/mlp_out", ("layers.9.mlp_out",)),
        ("gs2:11/resid_post", ("layers.11.resid_post",)),
        ("gs2:11/resid_post_all", ("layers.11.resid_post",)),
        ("gs2:9/transcoder", ("layers.9.mlp_in", "layers.9.mlp_out")),
        ("gs2:attn_out_all/layer_0_width_16k_l0_small", ("layers.0.attn_z",)),
        ("gs2:resid_post/layer_9_width_262k_l0_medium", ("layers.9.resid_post",)),
        ("gs2:transcoder/layer_10_width_16k_l0_small_affine", ("layers.10.mlp_in", "layers.10.mlp_out")),
        ("tl:blocks.9.hook_resid_pre", ("layers.9.resid_pre",)),
        ("tl:blocks.9.attn.hook_z", ("layers.9.attn_z",)),
        ("tl:blocks.9.hook_attn_out", ("layers.9.attn_out",)),
        ("tl:blocks.9.hook_resid_mid", ("layers.9.resid_mid",)),
        ("tl:blocks.9.hook_mlp_out", ("layers.9.mlp_out",)),
        ("tl:blocks.11.hook_resid_post", ("layers.11.resid_post",)),
        ("layers.9.attn_z", ("layers.9.attn_z",)),
    ],
)
def test_a_foreign_name_is_that_of_a_hook_point(foreign: str, ours: tuple[str, ...]) -> None:
    assert translate(foreign) == translate(foreign, "Gemma3ForCausalLM") == ours
    assert expand(foreign, NAMES) == ours


def test_all_layers_of_a_foreign_name() -> None:
    assert expand(["gs2:*/attn_out", "tl:blocks.*.hook_mlp_out", "gs2:mlp_out/layer_*"], NAMES) == tuple(
        name for name in NAMES if name.endswith(("attn_z", "mlp_out"))
    )


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ("tl:blocks.9.hook_mlp_in", r"the residual before the norm \(layers\.9\.resid_mid\); .* is layers\.9\.mlp_in"),
        ("tl:blocks.9.ln2.hook_normalized", r"folds into the weights .* with its gain it is layers\.9\.mlp_in"),
        ("tl:blocks.9.ln1.hook_normalized", "no stream of ours is what attention reads"),
        ("tl:blocks.9.ln1_post.hook_normalized", r"with it, it is layers\.9\.attn_out"),
        ("tl:blocks.9.ln2_post.hook_normalized", r"with it, it is layers\.9\.mlp_out"),
        ("tl:blocks.9.attn.hook_q", "inside attention, the MLP or a norm"),
        ("tl:blocks.9.ln2.hook_scale", "inside attention, the MLP or a norm"),
        ("tl:blocks.9.hook_resid_pst", "did you mean 'hook_resid_post'"),
        ("tl:hook_embed", "no hook of a block; write e.g. tl:blocks"),
        ("gs2:9/attn_in", "is no folder of Gemma Scope 2; .* attn_out, mlp_out, resid_post, transcoder"),
        ("gs2:layers.9.attn_z", "is no folder of Gemma Scope 2"),
        ("gs1:9/attn_out", "no prefix 'gs1' .*did you mean 'gs2'"),
        ("tl:blocks.99.hook_resid_post", r"which is 'layers\.99\.resid_post': layer 99 is out of range; .* 0\.\.11"),
    ],
)
def test_a_name_without_an_equal_is_refused_with_the_difference(foreign: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message) as caught:
        expand([foreign], NAMES)
    assert repr(foreign) in str(caught.value)


def test_what_differs_in_some_architectures_is_refused_there() -> None:
    assert translate("tl:blocks.3.attn.hook_z", "LlamaForCausalLM") == ("layers.3.attn_z",)
    with pytest.raises(UnknownNameError, match=r"lacks the bias of the values.* layers\.3\.attn_z has it"):
        translate("tl:blocks.3.attn.hook_z", "Qwen2ForCausalLM")
    with pytest.raises(UnknownNameError, match="is of Gemma 3, not of LlamaForCausalLM"):
        translate("gs2:3/attn_out", "LlamaForCausalLM")


@pytest.mark.parametrize("architecture", ["Gemma3ForConditionalGeneration", "LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_the_names_that_are_shown_are_understood(architecture: str) -> None:
    shown = {stream: foreign_names(stream, architecture) for stream in STREAMS}
    for stream, names in shown.items():
        for name in names:
            assert translate(name.format(L=7), architecture) == (f"layers.7.{stream}",)
    assert shown["mlp_in"] == ()
    assert ("gs2:{L}/attn_out" in shown["attn_z"]) == architecture.startswith("Gemma3")
    assert ("tl:blocks.{L}.attn.hook_z" in shown["attn_z"]) == (architecture != "Qwen2ForCausalLM")
