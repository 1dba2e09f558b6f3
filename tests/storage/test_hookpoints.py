import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.hookpoints import STREAMS, HookPoint, expand

NAMES = [f"layers.{layer}.{stream}" for layer in range(3) for stream in ("mlp_in", "mlp_out", "resid_post")]


@given(st.integers(0, 9999), st.sampled_from(STREAMS))
def test_a_hook_point_reads_its_own_text(layer: int, stream: str) -> None:
    assert HookPoint.parse(str(HookPoint(layer, stream))) == HookPoint(layer, stream)


@pytest.mark.parametrize(
    "name",
    ["", "layers.9", "layers.09.mlp_in", "layer.9.mlp_in", "layers.-1.mlp_in", "layers.9.mlp_in ", "layers.*.mlp_in"],
)
def test_what_is_no_hook_point_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(repr(name)) + ".*layers.9.resid_post"):
        HookPoint.parse(name)


def test_an_unknown_stream_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no stream 'resid_pots'; did you mean 'resid_post'"):
        HookPoint.parse("layers.9.resid_pots")
    with pytest.raises(BadInputError, match="layer -1 is negative"):
        HookPoint(-1, "mlp_in")


def test_expand_gives_each_name_once_in_the_order_of_the_model() -> None:
    assert expand(["layers.2.*", "layers.*.mlp_out", "layers.2.mlp_in"], NAMES) == (
        "layers.0.mlp_out",
        "layers.1.mlp_out",
        "layers.2.mlp_in",
        "layers.2.mlp_out",
        "layers.2.resid_post",
    )
    assert expand("layers.1.mlp_in", NAMES) == ("layers.1.mlp_in",)
    assert expand("*", NAMES) == tuple(NAMES)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.3.mlp_in", "layer 3 is out of range; the layers are 0..2"),
        ("layers.99.*", "layer 99 is out of range; the layers are 0..2"),
        ("layers.1.mlp_inn", "did you mean 'layers.1.mlp_in'?"),
        ("layers.*.resid_pos", "did you mean 'layers.*.resid_post'?"),
        ("layers.*.what_is_not_there", "valid names: layers.*.mlp_in, layers.*.mlp_out, layers.*.resid_post"),
        ("blocks", "valid names: layers.0.mlp_in"),
    ],
)
def test_a_pattern_that_selects_nothing_says_what_is_there(pattern: str, message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        expand(["layers.1.mlp_in", pattern], NAMES)
    assert f"no hook point {pattern!r}" in str(caught.value)
    assert message in str(caught.value)


def test_layers_with_gaps_are_listed() -> None:
    with pytest.raises(UnknownNameError, match="the layers are 5, 9, 12"):
        expand("layers.6.mlp_in", [f"layers.{layer}.mlp_in" for layer in (5, 9, 12)])


def test_no_pattern_and_no_text_are_refused() -> None:
    with pytest.raises(BadInputError, match="name at least one"):
        expand([], NAMES)
    with pytest.raises(BadInputError, match="not 9"):
        expand([9], NAMES)  # type: ignore[list-item]


def test_nearest_lists_at_most_twelve_names() -> None:
    assert (
        nearest("zzz", [f"n{i:02d}" for i in range(20)])
        == "; valid names: " + ", ".join(f"n{i:02d}" for i in range(12)) + ", ..."
    )
    assert nearest("zzz", ["a"]) == "; valid names: a"
