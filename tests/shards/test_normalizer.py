"""A normalizer maps rows as its kind says and back, and folds into weights that give the same on raw rows."""

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import relu

from actlake.shards.normalizer import KINDS, Normalizer
from actlake.storage.errors import BadInputError, UnknownNameError
from actlake.storage.moments import Moments

RESID, MLP = "layers.3.resid_post", "layers.3.mlp_out"
every_kind = pytest.mark.parametrize("kind", KINDS)


def made_rows(n: int, width: int, seed: int) -> Tensor:
    """Return float64 [n, width] that are exact in bfloat16; channels differ in mean and size, one by a factor of 90."""
    random = np.random.default_rng(seed)
    channel = np.arange(width)
    rows = random.normal(size=(n, width)) * (1 + channel) + 3 * np.cos(channel) + 900.0 * (channel == 2)
    return torch.from_numpy(rows).bfloat16().double()


ROWS = {RESID: made_rows(500, 12, 0), MLP: made_rows(500, 5, 1)}
MOMENTS = {name: Moments.of(rows.numpy()) for name, rows in ROWS.items()}


def test_unit_makes_the_mean_squared_norm_one() -> None:
    rows = Normalizer.of(MOMENTS, "unit").apply(ROWS)
    for name, found in rows.items():
        assert float(found.square().sum(1).mean()) == pytest.approx(1, rel=1e-12)
        torch.testing.assert_close(found / ROWS[name], (found / ROWS[name])[:1, :1].expand_as(found))


def test_sqrt_d_makes_the_mean_norm_the_root_of_the_width() -> None:
    rows = Normalizer.of(MOMENTS, "sqrt_d").apply(ROWS)
    assert float(rows[RESID].norm(dim=1).mean()) == pytest.approx(math.sqrt(12), rel=1e-12)
    assert float(rows[MLP].norm(dim=1).mean()) == pytest.approx(math.sqrt(5), rel=1e-12)


def test_standardize_makes_each_channels_mean_zero_and_variance_one() -> None:
    rows = Normalizer.of(MOMENTS, "standardize").apply(ROWS)[RESID]
    torch.testing.assert_close(rows.mean(0), torch.zeros(12).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(rows.var(0, unbiased=False), torch.ones(12).double(), atol=1e-12, rtol=0)


@every_kind
def test_rows_are_computed_in_float32_and_come_back(kind: str) -> None:
    normalizer = Normalizer.of(MOMENTS, kind)
    raw = {name: rows.bfloat16() for name, rows in ROWS.items()}
    kept = {name: rows.clone() for name, rows in raw.items()}
    rows = normalizer.apply(raw)
    back = normalizer.invert(rows)
    for name, exact in normalizer.apply(ROWS).items():
        assert rows[name].dtype == back[name].dtype == torch.float32
        # A mean of 300 deviations, rounded to float32, is off by up to 2e-5 of one.
        torch.testing.assert_close(rows[name].double(), exact, rtol=1e-6, atol=2e-5)
        assert torch.equal(back[name].bfloat16(), raw[name])
        assert torch.equal(raw[name], kept[name])


@every_kind
def test_a_single_point_needs_no_name_and_any_leading_shape(kind: str) -> None:
    normalizer = Normalizer.of({RESID: MOMENTS[RESID]}, kind)
    rows = normalizer.apply(ROWS[RESID])
    assert torch.equal(normalizer.apply(ROWS[RESID].reshape(5, 100, 12)).reshape(500, 12), rows)
    assert torch.equal(normalizer.apply({RESID: ROWS[RESID]})[RESID], rows)
    assert torch.equal(Normalizer.of(MOMENTS, kind).apply(ROWS[RESID], RESID), rows)


@every_kind
def test_gradients_pass(kind: str) -> None:
    normalizer = Normalizer.of({MLP: MOMENTS[MLP]}, kind)
    rows = ROWS[MLP].clone().requires_grad_()
    normalizer.invert(normalizer.apply(rows)).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, torch.ones_like(rows))


def test_a_constant_channel_and_a_point_of_zeros_keep_their_scale() -> None:
    rows = ROWS[MLP].clone()
    rows[:, 1] = 0.3125
    standardize = Normalizer.of({MLP: Moments.of(rows.numpy())}, "standardize")
    assert (standardize.maps[MLP].scale[1], standardize.maps[MLP].center[1]) == (1.0, 0.3125)
    assert torch.equal(standardize.apply(rows)[:, 1], torch.zeros(500).double())
    assert torch.equal(standardize.invert(standardize.apply(rows.float())).bfloat16(), rows.bfloat16())
    zeros = {MLP: Moments.of(np.zeros((7, 5)))}
    for kind in KINDS:
        assert torch.equal(Normalizer.of(zeros, kind).apply(torch.ones(2, 5)), torch.ones(2, 5))


@every_kind
def test_pickles_without_the_constants_of_a_device(kind: str) -> None:
    normalizer = Normalizer.of(MOMENTS, kind, [RESID], [MLP])
    rows = normalizer.apply(ROWS)
    again = pickle.loads(pickle.dumps(normalizer))
    assert (normalizer._constants != {}, again._constants) == (True, {})
    assert (again.kind, again.inputs, again.targets) == (kind, (RESID,), (MLP,))
    assert all(torch.equal(found, rows[name]) for name, found in again.apply(ROWS).items())


# --- weights ---


def weights(d: int, e: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(n)
    shapes = ((d, n), (n,), (n, e), (e,))
    W_enc, b_enc, W_dec, b_dec = (torch.randn(shape, generator=random, dtype=dtype) / 4 for shape in shapes)
    return W_enc, b_enc, W_dec, b_dec


def jump_relu(scores: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(scores > threshold, scores, 0)


@every_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("target", [RESID, MLP], ids=["sae", "transcoder"])
@pytest.mark.parametrize("jumps", [False, True], ids=["relu", "jumprelu"])
def test_folded_weights_do_the_same_on_raw_rows(
    kind: str, dtype: torch.dtype, tolerance: float, target: str, jumps: bool
) -> None:
    normalizer = Normalizer.of(MOMENTS, kind, [RESID], [] if target == RESID else [target])
    given = weights(12, 12 if target == RESID else 5, 30, dtype)
    threshold = torch.linspace(0.1, 1, 30, dtype=dtype) if jumps else None
    act: Callable[[Tensor], Tensor] = relu if threshold is None else lambda scores: jump_relu(scores, threshold)

    def run(rows: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> tuple[Tensor, Tensor]:
        latents = act(rows @ W_enc + b_enc)
        return latents, latents @ W_dec + b_dec

    raw = ROWS[RESID].to(dtype)
    latents, reconstruction = run(normalizer.apply(raw, RESID), *given)
    wanted = normalizer.invert(reconstruction, target)
    folded = normalizer.fold(*given, threshold)
    assert folded.threshold is threshold
    assert {w.dtype for w in folded[:4]} == {dtype}
    found, rows = run(raw, *folded[:4])
    # In float32 a score at the very threshold may fall on either side of it.
    same = ((found > 0) == (latents > 0)).all(1)
    assert int(same.sum()) >= (500 if dtype == torch.float64 else 495)
    scale = float(wanted.abs().max())
    torch.testing.assert_close(found[same], latents[same], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(rows[same], wanted[same], rtol=tolerance, atol=tolerance * scale)
    assert float((normalizer.apply(raw, RESID) - raw).abs().max()) > 1  # there is something to fold


def test_folding_a_parameter_gives_a_plain_tensor() -> None:
    normalizer = Normalizer.of({RESID: MOMENTS[RESID]}, "unit")
    folded = normalizer.fold(*(torch.nn.Parameter(w) for w in weights(12, 12, 3, torch.float32)))
    assert not any(w.requires_grad for w in folded[:4])


def test_a_point_is_chosen_by_name_where_there_are_several() -> None:
    both = Normalizer.of(MOMENTS, "standardize")
    one = Normalizer.of(MOMENTS, "standardize", [MLP], [RESID])
    given = weights(5, 12, 7, torch.float64)
    for named, default in zip(both.fold(*given, source=MLP, target=RESID)[:4], one.fold(*given)[:4], strict=True):
        assert torch.equal(named, default)
    with pytest.raises(BadInputError, match=r"2 hook points \(layers\.3\.resid_post, .*\): say which with source="):
        both.fold(*given)


# --- bad input ---


def test_what_cannot_be_normalised_is_refused() -> None:
    normalizer = Normalizer.of(MOMENTS, "unit")
    with pytest.raises(BadInputError, match="no normalisation 'l2'; valid kinds: unit, sqrt_d, standardize"):
        Normalizer.of(MOMENTS, "l2")
    with pytest.raises(BadInputError, match=r"layers\.3\.mlp_out has no rows"):
        Normalizer.of({MLP: Moments.empty(5)}, "unit")
    with pytest.raises(BadInputError, match="at least one input"):
        Normalizer.of({}, "unit")
    with pytest.raises(UnknownNameError, match=r"'layers\.3\.resid_pos'; did you mean 'layers\.3\.resid_post'"):
        Normalizer.of(MOMENTS, "unit", ["layers.3.resid_pos"])
    with pytest.raises(UnknownNameError, match=r"no statistics of 'layers\.4\.mlp_out'"):
        normalizer.apply({"layers.4.mlp_out": ROWS[MLP]})
    with pytest.raises(BadInputError, match=r"2 hook points .* say which with point="):
        normalizer.apply(ROWS[MLP])
    with pytest.raises(BadInputError, match=r"rows \[500, 5\] are not rows of layers\.3\.resid_post, .* width 12"):
        normalizer.apply(ROWS[MLP], RESID)
    with pytest.raises(BadInputError, match=r"W_dec is for 12 channels, but layers\.3\.mlp_out has 5"):
        normalizer.fold(*weights(12, 12, 3, torch.float32), source=RESID, target=MLP)
