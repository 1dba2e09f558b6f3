"""What each trainer calls a batch: small views of a stream; ``shards.sequences`` has the one of whole sequences.

Every adapter is re-iterable and answers ``next()``; both go on from the stream's current state. State and length are
the stream's own. Tensors are owned by whoever gets them and may be written to: plain ones are the batch's memory,
stacked ones one copy of it.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from actlake.shards.batch import TokenBatch
from actlake.shards.normalizer import Affine, Normalizer
from actlake.storage.errors import BadInputError
from actlake.storage.hookpoints import HookPoint

T = TypeVar("T")

State = Mapping[str, Any]

# Shapes: B rows of a batch, D channels, N hook points, L layers.


class BatchStream(Protocol):
    """What an adapter reads of a stream; ``ActivationStream`` has it."""

    @property
    def hook_points(self) -> tuple[str, ...]: ...
    @property
    def inputs(self) -> tuple[str, ...]: ...
    @property
    def targets(self) -> tuple[str, ...]: ...
    @property
    def widths(self) -> Mapping[str, int]: ...
    @property
    def settings(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def normalizer(self) -> Normalizer | None: ...
    def __iter__(self) -> Iterator[TokenBatch]: ...
    def __len__(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: State | Sequence[State], /) -> None: ...


class Adapter(IterableDataset[T], Generic[T]):
    """Batches of a stream in another form.

    ``iter()`` begins at the stream's current state and replaces an iterator of before. ``next()`` goes on as one
    iteration does: it raises ``StopIteration`` once at its end, and then begins the next.
    """

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream
        self._running: Iterator[T] | None = None

    @abstractmethod
    def convert(self, batch: TokenBatch) -> T:
        """Return a batch of the stream in this adapter's form."""

    def __iter__(self) -> Iterator[T]:
        self._running = None
        # A generator would hold each batch until the next one is asked for.
        return map(self.convert, self.stream)

    def __next__(self) -> T:
        if self._running is None:
            running = iter(self)
            self._running = running
        try:
            return next(self._running)
        except StopIteration:
            self._running = None
            raise

    def __len__(self) -> int:
        return len(self.stream)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_running": None}

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's state: what has been delivered."""
        return self.stream.state_dict()

    def load_state_dict(self, state: State | Sequence[State]) -> None:
        """Go to a saved state, or to the states of all ranks; iterators of before are replaced."""
        self._running = None
        self.stream.load_state_dict(state)


class Tensors(Adapter[Tensor]):
    """[B, D] of the stream's only hook point: SAELens' ``SAETrainer``, dictionary_learning."""

    def __init__(self, stream: BatchStream) -> None:
        super().__init__(stream)
        if len(stream.hook_points) != 1:
            raise BadInputError(
                f"tensors() takes one hook point, not {_listed(stream.hook_points)}; "
                "stream one, or use dicts() or stack()"
            )
        self.hook_point = stream.hook_points[0]

    def convert(self, batch: TokenBatch) -> Tensor:
        """Return [B, D]."""
        return batch.activations[self.hook_point]


class Dicts(Adapter[dict[str, Tensor]]):
    """Hook point to [B, D]: SAELens' ``MultiSAETrainer`` and loops of one's own."""

    def convert(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return a dict of tensors, the same rows under every key."""
        return dict(batch.activations)


class _Stacked(Adapter[Tensor]):
    # Hook points of one width side by side.

    def __init__(self, stream: BatchStream, hook_points: Sequence[str], adapter: str) -> None:
        super().__init__(stream)
        self.hook_points = tuple(hook_points)
        _same_width(stream, self.hook_points, adapter)

    def convert(self, batch: TokenBatch) -> Tensor:
        """Return [B, N, D], in the order of ``hook_points``."""
        return torch.stack([batch.activations[name] for name in self.hook_points], dim=1)


class Stack(_Stacked):
    """[B, N, D] in the order of ``hook_points``: crosscoders."""

    def __init__(self, stream: BatchStream) -> None:
        super().__init__(stream, stream.hook_points, "stack()")


class Pairs(_Stacked):
    """[B, 2, D], input and target: transcoders; without targets, the two hook points of the stream."""

    def __init__(self, stream: BatchStream) -> None:
        hook_points = (*stream.inputs, *stream.targets)
        if len(hook_points) != 2 or len(stream.targets) > 1:
            raise BadInputError(
                f"pairs() takes one input and one target, not {len(stream.inputs)} and {len(stream.targets)}; "
                'stream {"inputs": ["layers.9.mlp_in"], "targets": ["layers.9.mlp_out"]}'
            )
        super().__init__(stream, hook_points, "pairs()")


class CltStack(_Stacked):
    """[B, 2, L, D], inputs and targets of the same layers, ascending: crosslayer-transcoder."""

    def __init__(self, stream: BatchStream) -> None:
        inputs, targets = _sides(stream, "clt_stack()")
        if list(inputs) != list(targets):
            raise BadInputError(
                f"clt_stack() takes the same layers on both sides, not {list(inputs)} and {list(targets)}; "
                "stream targets of the inputs' layers"
            )
        super().__init__(stream, (*inputs.values(), *targets.values()), "clt_stack()")
        self.layer_indices = list(inputs)

    def convert(self, batch: TokenBatch) -> Tensor:
        """Return [B, 2, L, D]."""
        rows = super().convert(batch)
        return rows.view(len(rows), 2, len(self.layer_indices), -1)


class Layers(Adapter[tuple[dict[int, Tensor], dict[int, Tensor]]]):
    """(inputs, targets), each layer to [B, D], with the attributes of crosslayer-coding's activation stores.

    Keys are layer numbers. A cross-layer transcoder of some layers counts them from 0: ``renumber`` does, ascending.
    ``mean_tg`` and ``std_tg`` (target layer to [D]) undo a stream's ``normalize="standardize"``; else they are empty.
    """

    def __init__(self, stream: BatchStream, *, renumber: bool = False) -> None:
        super().__init__(stream)
        sides = _sides(stream, "layers()")
        _same_width(stream, (*sides[0].values(), *sides[1].values()), "layers()")
        layers = sorted({layer for side in sides for layer in side})
        number = {layer: place if renumber else layer for place, layer in enumerate(layers)}
        self.inputs, self.targets = ({number[layer]: name for layer, name in side.items()} for side in sides)
        self.layer_indices, self.num_layers = list(number.values()), len(number)
        self.d_model = stream.widths[next(iter(self.inputs.values()))]
        self.dtype, self.device = stream.dtype, stream.device
        self.train_batch_size_tokens: int = stream.settings.batch_size
        self.apply_normalization = stream.normalizer is not None

    @property
    def total_tokens(self) -> int:
        """Rows of one iteration; raise ``TypeError`` where it has no end."""
        return len(self) * self.train_batch_size_tokens

    @property
    def mean_tg(self) -> dict[int, Tensor]:
        """Mean of each target, float32 [D]."""
        return {layer: torch.from_numpy(found.center).float() for layer, found in self._standardized.items()}

    @property
    def std_tg(self) -> dict[int, Tensor]:
        """Standard deviation of each target, float32 [D]."""
        return {layer: torch.from_numpy(1 / found.scale).float() for layer, found in self._standardized.items()}

    @cached_property
    def _standardized(self) -> dict[int, Affine]:
        if self.stream.settings.normalize != "standardize" or (normalizer := self.stream.normalizer) is None:
            return {}
        return {layer: normalizer.maps[name] for layer, name in self.targets.items()}

    def convert(self, batch: TokenBatch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return inputs and targets by layer."""
        inputs, targets = (
            {layer: batch.activations[name] for layer, name in side.items()} for side in (self.inputs, self.targets)
        )
        return inputs, targets

    def get_batch(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Return what ``next()`` returns."""
        return next(self)

    def close(self) -> None:
        """Let go of the iteration that ``next()`` is in; another ``next()`` goes on from the same place."""
        self._running = None


class OpenMoss(Adapter[dict[str, Tensor]]):
    """Hook point to [B, D], with ``tokens`` (int64 [B]) and ``mask`` (bool [B], all true): OpenMOSS' llamascopium."""

    def convert(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return activations, tokens and mask, all on the activations' device."""
        device = next(iter(batch.activations.values())).device
        tokens = batch.token_id.to(device, torch.int64)
        return {**batch.activations, "tokens": tokens, "mask": torch.ones_like(tokens, dtype=torch.bool)}


# --- what a stream must have ---


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"


def _same_width(stream: BatchStream, names: Sequence[str], adapter: str) -> None:
    widths = [stream.widths[name] for name in names]
    if len(set(widths)) > 1:
        odd = next(name for name in names if stream.widths[name] != widths[0])
        raise BadInputError(
            f"{adapter} takes hook points of one width, but {names[0]} has {widths[0]} and {odd} has "
            f"{stream.widths[odd]}; stream those of one width, or use dicts()"
        )


def _sides(stream: BatchStream, adapter: str) -> tuple[dict[int, str], dict[int, str]]:
    """Return inputs and targets by layer, ascending; raise ``BadInputError`` where a layer has two on one side."""
    if not stream.targets:
        raise BadInputError(
            f"{adapter} needs inputs and targets; "
            'stream {"inputs": ["layers.*.mlp_in"], "targets": ["layers.*.mlp_out"]}'
        )
    return _by_layer(stream.inputs, adapter), _by_layer(stream.targets, adapter)


def _by_layer(names: Sequence[str], adapter: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for name in names:
        # Aligned datasets put their own name in front: base:layers.9.mlp_in.
        layer = HookPoint.parse(name.rpartition(":")[2]).layer
        if layer in found:
            raise BadInputError(
                f"{adapter} takes one hook point of each layer a side, but layer {layer} has {found[layer]} and {name};"
                " stream one of them, or use dicts()"
            )
        found[layer] = name
    return dict(sorted(found.items()))
