"""torch.compile for a model whose hook points stay in sight.

A compiled function cannot be hooked inside. So of each block the largest modules are compiled that hold no hook point
of the architecture: norms, the MLP, the norms of queries and keys. Which of them are captured makes no difference to
the bits, and hooks (of a capture or a splice) run between compiled parts. Each batch shape gets kernels of its own:
kernels for any shape would depend on the first one seen, and with them the bits of a shard that is built again.
"""

import inspect
from collections.abc import Callable, Iterator, Set
from typing import Any

import torch
from torch import nn

from actlake.ingest.hooks import Architecture
from actlake.storage.errors import BadInputError

#: Far more batch shapes than a corpus has; beyond it torch would raise, not fall back.
_MOST_SHAPES = 1_024


def compile_between_taps(text: nn.Module, rows: Architecture, place: torch.device) -> int:
    """Compile what lies between the hook points of each block, in place; return how many modules that were.

    Raises ``BadInputError`` where there is no compiler.
    """
    _check_compiler(place)
    tapped = {tap.module for tap in rows.taps.values() if tap.module}
    parts = [part for block in text.get_submodule(rows.layers).children() for part in _untapped(block, "", tapped)]
    for part in parts:
        part.forward = _compiled(part.forward)
    return len(parts)


def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # Its annotations lack recompile_limit.
    compiler: Any = torch.compile
    made: Callable[..., torch.Tensor] = compiler(function, fullgraph=True, dynamic=False, recompile_limit=_MOST_SHAPES)
    return made


def _untapped(parent: nn.Module, path: str, tapped: Set[str]) -> Iterator[nn.Module]:
    for name, child in parent.named_children():
        inner = f"{path}{name}"
        if any(tap.startswith(f"{inner}.") for tap in tapped):
            yield from _untapped(child, f"{inner}.", tapped)
        elif not isinstance(child, nn.Linear):
            # One matrix product has nothing to fuse with.
            yield child


def _check_compiler(place: torch.device) -> None:
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        raise BadInputError(f"compile = true needs a newer torch than {torch.__version__}; upgrade it, or leave it out")
    try:
        _compiled(lambda x: x + 1)(torch.zeros(2, device=place))
    except Exception as error:  # whatever a compiler that is absent or broken raises
        remedy = "install a C++ compiler" if place.type == "cpu" else "install triton"
        reason = " ".join(str(error).partition("\n\n")[0].split())
        raise BadInputError(
            f"compile = true cannot be used on {str(place)!r}: {reason}; {remedy}, or leave it out"
        ) from error
