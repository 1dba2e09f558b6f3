"""Hook points: the addresses ``layers.{L}.{stream}`` and the patterns that select them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from actlake.storage.errors import BadInputError, UnknownNameError, nearest
from actlake.storage.foreign_names import translate

#: Streams in the order of the computation inside a block.
STREAMS = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")

_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,3})\.([a-z_]+)")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, order=True)
class HookPoint:
    """An address in the model: the text form ``layers.9.resid_post`` is the key everywhere."""

    layer: int
    stream: str

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise UnknownNameError(f"no stream {self.stream!r}{nearest(self.stream, STREAMS)}")
        if self.layer < 0:
            raise BadInputError(f"layer {self.layer} is negative; layers count from 0")

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.stream}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read ``layers.9.resid_post``; raise ``BadInputError`` for anything else."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise BadInputError(f"{name!r} is no hook point; write layers.<layer>.<stream>, e.g. layers.9.resid_post")
        return cls(int(match[1]), match[2])


def expand(patterns: str | Sequence[str], available: Iterable[str], architecture: str = "") -> tuple[str, ...]:
    """Return the available names that the patterns select, each once, in the order of ``available``.

    ``*`` stands for any part of a name (``layers.*.resid_post``, ``layers.9.*``). Names of other tools stand for ours
    (``gs2:9/attn_out``, ``tl:blocks.9.hook_resid_post``), as they do in models of ``architecture``. Raises
    ``UnknownNameError`` naming the valid layer range or the nearest name for a pattern that selects nothing,
    ``BadInputError`` for no pattern.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names = list(available)
    if not wanted:
        raise BadInputError("no hook point given; name at least one, e.g. 'layers.9.resid_post'")
    chosen: set[str] = set()
    for pattern in wanted:
        if not isinstance(pattern, str):
            raise BadInputError(f"hook points are text such as 'layers.9.resid_post', not {pattern!r}")
        for ours in translate(pattern, architecture):
            found = {name for name in names if fnmatchcase(name, ours)}
            if not found:
                shown = repr(pattern) if ours == pattern else f"{pattern!r}, which is {ours!r}"
                raise UnknownNameError(f"no hook point {shown}{_hint(ours, names)}")
            chosen |= found
    return tuple(name for name in names if name in chosen)


def _hint(pattern: str, names: Sequence[str]) -> str:
    layers = sorted({HookPoint.parse(name).layer for name in names})
    match = _LAYER.match(pattern)
    if layers and match and int(match[1]) not in layers:
        dense = layers == list(range(layers[0], layers[-1] + 1))
        valid = f"{layers[0]}..{layers[-1]}" if dense else ", ".join(map(str, layers))
        return f": layer {match[1]} is out of range; the layers are {valid}"
    stream = pattern.rsplit(".", 1)[-1]
    streams = {HookPoint.parse(name).stream for name in names}
    if match is None and pattern.startswith("layers.*.") and stream not in streams:
        return nearest(pattern, {f"layers.*.{s}" for s in streams})
    return nearest(pattern, names)
