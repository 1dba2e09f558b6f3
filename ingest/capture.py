"""Run a model over token ids and take the tensors at its hook points."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from actlake.ingest.hooks import Tap, architecture
from actlake.ingest.models import LoadedModel
from actlake.storage.errors import BadInputError, ModelAccessError
from actlake.storage.hookpoints import STREAMS, HookPoint, expand


class _DeepestReached(Exception):
    """Raised by the deepest hook, whose tensor is the last one wanted; no error."""


class Capture:
    """Calls a model and returns the tensors at the given hook points; the rest of the forward pass does not run.

    One per worker: hooks are on the model only during a call, so two threads must not share one model.
    Positions count from 0 and attention is causal: rows are right-padded with any valid id, and what is returned at
    padding is for the caller to ignore. Raises ``UnknownNameError`` for a point that the model does not have.
    """

    def __init__(self, model: LoadedModel, points: Sequence[str]) -> None:
        self.model = model
        self.points = expand(points, model.shape.widths())
        self._widths = {point: model.shape.widths()[point] for point in self.points}
        rows = architecture(model.shape.architecture)
        taps = [(str(point), *rows.tap(point)) for point in sorted(map(HookPoint.parse, self.points), key=_depth)]
        self._taps = [(name, model.text.get_submodule(path), tap) for name, path, tap in taps]

    def __call__(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``{point: [B, T, d]}`` in the model's dtype, on its device, for int64 ``input_ids`` [B, T].

        Raises ``BadInputError`` for ids that are not of that shape and type, or rows longer than the model's context.
        """
        self._check_input(input_ids)
        taken: dict[str, torch.Tensor] = {}
        handles: list[RemovableHandle] = []
        try:
            for name, module, tap in self._taps:
                handles.append(_hook(module, tap, self._taker(name, taken)))
            with torch.inference_mode():
                self.model.text(input_ids=input_ids.to(self.model.device), use_cache=False)
        except _DeepestReached:
            pass  # The usual end.
        finally:
            for handle in handles:
                handle.remove()
        self._check_output(taken, input_ids)
        return {name: taken[name] for name in self.points}

    def _taker(self, name: str, taken: dict[str, torch.Tensor]) -> Callable[[Any], None]:
        deepest = name == self._taps[-1][0]

        def take(tensor: Any) -> None:
            # Blocks return a tuple in transformers 4.
            taken[name] = tensor[0] if isinstance(tensor, tuple) else tensor
            if deepest:
                raise _DeepestReached

        return take

    def _check_input(self, input_ids: torch.Tensor) -> None:
        if input_ids.dtype != torch.int64 or input_ids.dim() != 2 or input_ids.numel() == 0:
            raise BadInputError(f"token ids must be int64 [B, T], not {input_ids.dtype} {list(input_ids.shape)}")
        if input_ids.shape[1] > self.model.shape.context_length:
            raise BadInputError(
                f"sequences of {input_ids.shape[1]} tokens exceed the model's {self.model.shape.context_length}; "
                "lower corpus.context_length"
            )

    def _check_output(self, taken: dict[str, torch.Tensor], input_ids: torch.Tensor) -> None:
        for name in self.points:
            expected = (*input_ids.shape, self._widths[name])
            tensor = taken.get(name)
            if tensor is None or tuple(tensor.shape) != expected or tensor.dtype != self.model.dtype:
                found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise ModelAccessError(
                    f"{name} gave {found}, not {self.model.dtype} {list(expected)}: transformers' code for it is "
                    "not as its row in actlake.ingest.hooks says; install another version or mend the row"
                )


def _depth(point: HookPoint) -> tuple[int, int]:
    return point.layer, STREAMS.index(point.stream)


def _hook(module: nn.Module, tap: Tap, take: Callable[[Any], None]) -> RemovableHandle:
    if tap.side == "output":
        return module.register_forward_hook(lambda _module, _args, output: take(output))

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(before, with_kwargs=True)
