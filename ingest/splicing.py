"""Put functions into a running model: an autoencoder at a hook point, a transcoder from one hook point to another."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from actlake.ingest.hooks import Tap, architecture, attach, locate
from actlake.ingest.loading import LoadedModel
from actlake.ingest.models import ModelShape, shape_of
from actlake.storage.errors import BadInputError
from actlake.storage.hookpoints import STREAMS, HookPoint, expand

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: From a tensor [B, T, D] of one hook point to what takes its place, or that of another hook point.
Function = Callable[[torch.Tensor], torch.Tensor]


class _Splice(NamedTuple):
    """A function on its way: ``held`` has what it made of the point that it reads, until the other one is reached."""

    read: str
    write: str
    function: Function
    held: list[torch.Tensor]


@contextmanager
def splice(
    model: "LoadedModel | PreTrainedModel", functions: Mapping[str | tuple[str, str], Function]
) -> Iterator[None]:
    """Run the model, for as long as the block lasts, with functions put in at hook points.

    ``{point: function}`` replaces the tensor [B, T, D] at a point by what the function makes of it, and
    ``{(read, write): function}`` the one at ``write`` by what it makes of the one at ``read``. What a function returns
    is cast to the model's dtype. Everything later in the model sees the new values, functions at later points too: a
    new ``resid_mid`` enters the MLP, and its output is added to it. Points are written as in a job file, those of
    other tools included. Gradients flow, unless they are off.

    Raises ``BadInputError`` for a point that is written twice or read too late, and for a result of another shape;
    ``UnknownNameError`` for a point that the model does not have.
    """
    text, shape = _text_of(model)
    splices = [_Splice(*_read_and_write(key, shape), function, []) for key, function in functions.items()]
    written = [one.write for one in splices]
    if twice := sorted({write for write in written if written.count(write) > 1}):
        raise BadInputError(f"{', '.join(twice)} would be written by two functions; make one of them")
    points = {point for one in splices for point in (one.read, one.write)}
    with ExitStack() as stack:
        for point, module, tap in locate(text, shape.architecture, shape.widths(), points):
            stack.callback(attach(module, tap, _junction(point, tap, splices)).remove)
        yield


def _junction(point: str, tap: Tap, splices: list[_Splice]) -> Callable[[torch.Tensor], torch.Tensor | None]:
    """Return what happens at a hook point in every forward pass: it is written first, and read for others then."""
    writer = next((splice for splice in splices if splice.write == point), None)
    readers = [splice for splice in splices if splice.read == point != splice.write]

    def see(tensor: torch.Tensor) -> torch.Tensor | None:
        new = None if writer is None else _written(writer, tensor)
        if new is not None and tap.is_residual:
            tensor.copy_(new)
            new = None
        for reader in readers:
            reader.held.append(reader.function(tensor if new is None else new))
        return new

    return see


def _written(splice: _Splice, tensor: torch.Tensor) -> torch.Tensor:
    if splice.read == splice.write:
        # A copy, because a residual changes in place, which gradients through the function would not survive.
        new = splice.function(tensor.clone())
    else:
        new = splice.held.pop()
        splice.held.clear()
    if new.shape != tensor.shape:
        raise BadInputError(
            f"the function for {splice.write} returned {list(new.shape)}, not {list(tensor.shape)}: it must keep the "
            "batch and the tokens, and give the channels of the point that it writes"
        )
    return new.to(tensor)


def _text_of(model: "LoadedModel | PreTrainedModel") -> tuple[torch.nn.Module, ModelShape]:
    if isinstance(model, LoadedModel):
        return model.text, model.shape
    name = type(model).__name__
    text = model.get_submodule(architecture(name).text)
    config: Any = model.config
    return text, shape_of(config.get_text_config().to_dict(), name)


def _read_and_write(key: str | tuple[str, str], shape: ModelShape) -> tuple[str, str]:
    read, write = (_one(point, shape) for point in ((key, key) if isinstance(key, str) else key))
    if _depth(read) > _depth(write):
        raise BadInputError(f"({read!r}, {write!r}) reads what is computed after what it writes; swap the two")
    return read, write


def _one(point: str, shape: ModelShape) -> str:
    found = expand(point, shape.widths(), shape.architecture)
    if len(found) != 1:
        raise BadInputError(f"{point!r} is {len(found)} hook points; a function goes to one, e.g. {found[0]!r}")
    return found[0]


def _depth(point: str) -> tuple[int, int]:
    parsed = HookPoint.parse(point)
    return parsed.layer, STREAMS.index(parsed.stream)
