"""``ds.stream(...)``: what a user may ask of a stream, turned into settings."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from actlake.shards.normalizer import Normalizer
from actlake.shards.origin import Origin
from actlake.shards.settings import StreamSettings, this_rank
from actlake.shards.stream import ActivationStream
from actlake.storage.errors import BadInputError, UnknownNameError, nearest

if TYPE_CHECKING:
    from actlake.shards.dataset import Points


def make_stream(
    origin: Origin,
    points: "Points",
    *,
    batch_size: int = 4096,
    seed: int = 0,
    epochs: int | None = 1,
    rows: int | None = None,
    drop_last: bool = True,
    rank: int | None = None,
    world_size: int | None = None,
    same_batch: bool = False,
    order: Literal["shuffled", "sequence"] = "shuffled",
    dtype: "torch.dtype | str | None" = None,
    device: "str | torch.device" = "cpu",
    pin_memory: bool = False,
    normalize: Literal["unit", "sqrt_d", "standardize"] | None = None,
    columns: Sequence[str] = (),
    buffer_bytes: int | str = "1GiB",
    read_ahead: int | None = None,
    follow: bool | int = False,
    on_damage: Literal["raise", "skip"] = "raise",
) -> ActivationStream:
    """Return a stream of batches.

    Args:
        origin: what is streamed.
        points: hook points or patterns of them, e.g. ``"layers.*.resid_post"``; or ``{"inputs": ..., "targets": ...}``.
        batch_size: rows of a batch.
        seed: decides the order, together with the epoch.
        epochs: how many times each row comes in one iteration; None for no end.
        rows: end an iteration after so many rows of all ranks instead, epoch upon epoch; warns where rows repeat.
        drop_last: full batches alone, equally many on every rank; less than ``batch_size * world_size`` rows of an
            epoch are left out. Without an end, or with ``rows``, they are carried into the next epoch instead.
        rank: this process among ``world_size``; by default as ``torch.distributed`` has it, else 0 of 1.
        world_size: how many processes share the rows.
        same_batch: all ranks get the same rows (tensor parallelism).
        order: ``"sequence"`` puts the rows back into the corpus's order, block by block; every row is then copied on
            its own, at about half the speed, and two shuffle blocks must fit ``buffer_bytes``.
        dtype: of the tensors, e.g. ``"float32"``; by default as stored, float32 where they are normalised.
        device: where the tensors go.
        pin_memory: copy them to the device from pinned memory, while the trainer goes on; without effect where there is
            no accelerator, as in torch's ``DataLoader``.
        normalize: divide by a scale from the stored statistics, in float32 on the device: ``"unit"`` makes the mean
            squared norm 1, ``"sqrt_d"`` the mean norm sqrt(d), ``"standardize"`` each channel's mean 0 and variance 1.
        columns: metadata fields of the corpus to have in ``batch.columns``.
        buffer_bytes: memory for the batches in flight; a larger one mixes more chunks in each batch. It is a part of
            the order: a state continues only with the number of units per window that it began with. 0 mixes just the
            chunks of one batch, at the highest speed.
        read_ahead: how many chunks are read at once; by default one a core, sixteen a core from an object store.
        follow: read on while ingestion goes on, in waves of consecutive shards (8, or the number given), until all
            rows are there that were planned when the stream was made.
        on_damage: ``"skip"`` leaves out what cannot be read (``stats()`` counts it): batches then come shorter.

    Raises ``UnknownNameError`` or ``BadInputError`` for what cannot be streamed, ``UncommittedShardError`` where
    nothing is committed, ``MissingExtraError`` without torch.
    """
    rank, world_size = this_rank(rank, world_size, same_batch)
    inputs, targets = _sides(points, origin)
    settings = StreamSettings(
        inputs=inputs,
        targets=targets,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        rows=rows,
        drop_last=drop_last,
        rank=rank,
        world_size=world_size,
        order=order,
        dtype=_dtype(dtype),
        device=_device(device),
        pin_memory=pin_memory,
        normalize=normalize,
        columns=(columns,) if isinstance(columns, str) else tuple(columns),
        buffer_bytes=buffer_bytes,
        read_ahead=read_ahead,
        follow=follow,
        on_damage=on_damage,
    )
    return ActivationStream(origin, settings)


def stream_of(origin: Origin, points: "Points", options: Mapping[str, Any]) -> ActivationStream:
    """Return ``make_stream(origin, points, **options)``; raise ``UnknownNameError`` for an option that it has not."""
    known = list(inspect.signature(make_stream).parameters)[2:]
    for name in options:
        if name not in known:
            raise UnknownNameError(f"a stream has no option {name!r}{nearest(name, known)}")
    return make_stream(origin, points, **options)


def make_normalizer(origin: Origin, points: "Points", kind: str) -> Normalizer:
    """Return the normalizer of hook points by their statistics over all committed rows."""
    inputs, targets = _sides(points, origin)
    moments = {name: origin.statistics(name) for name in dict.fromkeys((*inputs, *targets))}
    return Normalizer.of(moments, kind, inputs, targets)


def _device(device: "str | torch.device") -> "str | torch.device":
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BadInputError(f"device = {device!r} is none: {str(error).splitlines()[0]}") from None
    # Counted only: a process that has used CUDA can no longer be forked into loader processes that do.
    count = getattr(getattr(torch, wanted.type, None), "device_count", None)
    if count is not None and (wanted.index or 0) >= count():
        raise BadInputError(
            f"device = {str(device)!r}: torch finds {count()} of {wanted.type} here; 'cpu' is always there"
        )
    return device


def _dtype(dtype: "torch.dtype | str | None") -> "torch.dtype | None":
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BadInputError(f"dtype = {dtype!r} is no dtype of activations; use e.g. 'float32' or torch.bfloat16")
    return found


def _sides(points: "Points", origin: Origin) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if not isinstance(points, Mapping):
        return _chosen(points, origin), ()
    strange = [str(side) for side in points if side not in ("inputs", "targets")]
    if strange or "inputs" not in points:
        hint = nearest(strange[0], ("inputs", "targets")) if strange else ""
        raise BadInputError(f"points = {dict(points)!r}: give 'inputs', and 'targets' for a second side{hint}")
    return _chosen(points["inputs"], origin), _chosen(points["targets"], origin) if points.get("targets") else ()


def _chosen(points: Any, origin: Origin) -> tuple[str, ...]:
    # Patterns in the order given, each with its hook points in the model's.
    patterns = [points] if isinstance(points, str) else list(points)
    if not patterns:
        raise BadInputError("no hook point given; name at least one, e.g. 'layers.9.resid_post'")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise BadInputError(f"hook points are text such as 'layers.9.resid_post', not {pattern!r}")
    return tuple(dict.fromkeys(name for pattern in patterns for name in origin.select(pattern)))
