"""Normalisation of activations by their stored statistics, and its inverse, for rows and for trained weights.

One affine map for each hook point, ``(x - center) * scale``: "unit" makes the mean squared norm 1 (Gemma Scope),
"sqrt_d" the mean norm sqrt(d) (sae-lens: expected_average_only_in), "standardize" each channel's mean 0 and variance 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.moments import Moments

F64 = npt.NDArray[np.float64]

#: What ``kind`` may be.
KINDS = ("unit", "sqrt_d", "standardize")

#: A spread below it has no reciprocal in float32.
_TINY = float(np.finfo(np.float32).tiny)

# Shapes: D channels of an input, E of a target, N latents.


class Folded(NamedTuple):
    """Weights for raw activations: ``raw_target = f(raw_input @ W_enc + b_enc) @ W_dec + b_dec``.

    ``W_enc`` [D, N], ``b_enc`` [N], ``W_dec`` [N, E] and ``b_dec`` [E] are in the dtypes and on the devices of the
    weights that were folded; ``threshold`` is the one given.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Affine:
    """One hook point's map ``(x - center) * scale``, both float64 [D]."""

    center: F64
    scale: F64

    @classmethod
    def of(cls, moments: Moments, kind: str) -> Self:
        """Return the map of a kind; what does not vary (a channel of "standardize", else the point) has scale 1."""
        width = len(moments.mean)
        if kind == "standardize":
            spread, center = np.sqrt(moments.variance), moments.mean
        else:
            size = np.sqrt(moments.mean_squared_norm) if kind == "unit" else moments.norm_mean / np.sqrt(width)
            spread, center = np.full(width, size), np.zeros(width)
        constant = spread < _TINY
        return cls(center=center, scale=1 / np.where(constant, 1.0, spread))


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalizer:
    """Maps rows of one or more hook points to a common size and back; ``Normalizer.of`` makes one from statistics.

    ``inputs`` and ``targets`` are the hook points of a dictionary's two sides; an autoencoder has no targets. Rows are
    computed in float32 (float64 ones in float64) on the device where they are. Pickles without its device constants.
    """

    kind: str
    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    maps: Mapping[str, Affine]
    _constants: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BadInputError(f"no normalisation {self.kind!r}; valid kinds: {', '.join(KINDS)}")
        if not self.inputs:
            raise BadInputError("a normalizer needs at least one input hook point, e.g. 'layers.9.resid_post'")
        for name in self.hook_points:
            self._map(name)

    @classmethod
    def of(
        cls,
        moments: Mapping[str, Moments],
        kind: str,
        inputs: Sequence[str] | None = None,
        targets: Sequence[str] = (),
    ) -> Self:
        """Return the normalizer of hook points with these statistics; ``inputs`` are by default all of them.

        Raises ``BadInputError`` for an unknown kind and for statistics of no rows, ``UnknownNameError`` for an input
        or a target without statistics.
        """
        for name, found in moments.items():
            if not found.count:
                raise BadInputError(f"{name} has no rows and so no scale; 'actlake ingest' with its job file adds some")
        maps = {name: Affine.of(found, kind) for name, found in moments.items()}
        chosen = tuple(moments) if inputs is None else tuple(inputs)
        return cls(kind=kind, inputs=chosen, targets=tuple(targets), maps=maps)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Inputs and targets, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_constants": {}}

    # --- rows ---

    @overload
    def apply(self, rows: Tensor, point: str | None = None) -> Tensor: ...
    @overload
    def apply(self, rows: Mapping[str, Tensor], point: None = None) -> dict[str, Tensor]: ...
    def apply(self, rows: Tensor | Mapping[str, Tensor], point: str | None = None) -> Tensor | dict[str, Tensor]:
        """Return raw rows normalised: [..., D] of any float dtype, or a mapping of hook points to such.

        ``point`` says whose rows a tensor holds; it may be left out where there is only one. Raises
        ``UnknownNameError`` for a point without statistics, ``BadInputError`` for rows of another width.
        """
        if isinstance(rows, Mapping):
            return {name: self.apply(tensor, name) for name, tensor in rows.items()}
        center, scale = self._constants_for(rows, point)
        if self.kind == "standardize":
            return torch.sub(rows, center).mul_(scale)
        # One number instead of one a channel, and no pass for a center of zeros.
        return torch.mul(rows, scale[:1])

    @overload
    def invert(self, rows: Tensor, point: str | None = None) -> Tensor: ...
    @overload
    def invert(self, rows: Mapping[str, Tensor], point: None = None) -> dict[str, Tensor]: ...
    def invert(self, rows: Tensor | Mapping[str, Tensor], point: str | None = None) -> Tensor | dict[str, Tensor]:
        """Return normalised rows, or a reconstruction of them, as raw rows; arguments and errors are ``apply``'s."""
        if isinstance(rows, Mapping):
            return {name: self.invert(tensor, name) for name, tensor in rows.items()}
        center, scale = self._constants_for(rows, point)
        if self.kind == "standardize":
            return torch.div(rows, scale).add_(center)
        return torch.div(rows, scale[:1])

    def _constants_for(self, rows: Tensor, point: str | None) -> tuple[Tensor, Tensor]:
        if point is None:
            point = self._only(self.hook_points, "point")
        found = self._map(point)
        if not rows.ndim or rows.shape[-1] != len(found.scale):
            raise BadInputError(f"rows {list(rows.shape)} are not rows of {point}, which has width {len(found.scale)}")
        key = (point, rows.device, torch.promote_types(rows.dtype, torch.float32))
        if key not in self._constants:
            # The dtype first: not every device has float64.
            center, scale = (torch.from_numpy(a).to(key[2]).to(key[1]) for a in (found.center, found.scale))
            self._constants[key] = center, scale
        return self._constants[key]

    # --- weights ---

    def fold(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor | None = None,
        *,
        source: str | None = None,
        target: str | None = None,
    ) -> Folded:
        """Return weights that do on raw rows what the given ones do on normalised rows.

        The dictionary is ``f(x @ W_enc + b_enc) @ W_dec + b_dec`` with ``W_enc`` [D, N] and ``W_dec`` [N, E]. The
        encoder takes the map of ``source`` and the decoder that of ``target``: the only input and the only target, or
        without targets the input, unless named. Latents keep their values for any ``f``, so a JumpReLU's ``threshold``
        stays as it is. Where an encoder subtracts ``b_dec`` first, give ``b_enc - b_dec @ W_enc`` for ``b_enc``.
        Computed in float64 on the CPU, without gradients. Raises ``BadInputError`` for weights of another width or a
        side of several points.
        """
        source = source or self._only(self.inputs, "source")
        target = target or self._only(self.targets or (source,), "target")
        enc, dec = self._map(source), self._map(target)
        _check_width("W_enc", W_enc.shape[0], source, enc)
        _check_width("W_dec", W_dec.shape[-1], target, dec)
        scale_D, center_D, scale_E, center_E = map(torch.from_numpy, (enc.scale, enc.center, dec.scale, dec.center))
        W, b, V, c = (w.detach().to("cpu", torch.float64) for w in (W_enc, b_enc, W_dec, b_dec))
        return Folded(
            W_enc=(scale_D[:, None] * W).to(W_enc),
            b_enc=(b - (center_D * scale_D) @ W).to(b_enc),
            W_dec=(V / scale_E).to(W_dec),
            b_dec=(c / scale_E + center_E).to(b_dec),
            threshold=threshold,
        )

    def _map(self, point: str) -> Affine:
        try:
            return self.maps[point]
        except KeyError:
            raise UnknownNameError(f"no statistics of {point!r}{nearest(point, self.maps)}") from None

    def _only(self, names: tuple[str, ...], argument: str) -> str:
        if len(names) > 1:
            listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise BadInputError(f"{len(names)} hook points ({listed}): say which with {argument}=")
        return names[0]


def _check_width(weights: str, n: int, point: str, found: Affine) -> None:
    if n != len(found.scale):
        raise BadInputError(f"{weights} is for {n} channels, but {point} has {len(found.scale)}")
