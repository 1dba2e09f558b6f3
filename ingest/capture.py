"""Run a model over token ids and take the tensors at its hook points."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.hooks import RemovableHandle

from actlake.ingest.hooks import attach, locate
from actlake.ingest.loading import LoadedModel
from actlake.storage.errors import BadInputError, ModelAccessError
from actlake.storage.hookpoints import expand


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
        self.points = expand(points, model.shape.widths(), model.shape.architecture)
        self._widths = {point: model.shape.widths()[point] for point in self.points}
        self._taps = locate(model.text, model.shape.architecture, self._widths, self.points)
        self._isolates = False

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, /) -> dict[str, torch.Tensor]:
        """Return ``{point: [B, T, d]}`` in the model's dtype, on its device, for int64 ``input_ids`` [B, T].

        With ``position_ids``, int64 [B, T], a row may hold several sequences: each position 0 begins another, and none
        sees another one. That is tried before the first such batch.

        Raises ``BadInputError`` for ids that are not of that shape and type, rows longer than the model's context, and
        an attention that does not keep sequences apart.
        """
        self._check_input(input_ids)
        if position_ids is not None:
            _check_positions(position_ids, input_ids)
            if not self._isolates:
                self._require_isolation()
        return self._run(input_ids, position_ids)

    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        taken: dict[str, torch.Tensor] = {}
        handles: list[RemovableHandle] = []
        try:
            for name, module, tap in self._taps:
                handles.append(attach(module, tap, self._taker(name, taken)))
            with torch.inference_mode():
                place = self.model.device
                positions = {} if position_ids is None else {"position_ids": position_ids.to(place)}
                self.model.text(input_ids=input_ids.to(place), use_cache=False, **positions)
        except _DeepestReached:
            pass  # The usual end.
        finally:
            for handle in handles:
                handle.remove()
        self._check_output(taken, input_ids)
        return {name: taken[name] for name in self.points}

    def _taker(self, name: str, taken: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
        deepest = name == self._taps[-1][0]

        def take(tensor: torch.Tensor) -> None:
            taken[name] = tensor
            if deepest:
                raise _DeepestReached

        return take

    def _require_isolation(self) -> None:
        """Run a sequence behind two others of the same shape: it must come out with the same bits."""
        position_ids = torch.tensor([[0, 1, 2, 0, 1]] * 2)
        behind = (torch.tensor([[*before, 4, 5]] * 2) for before in ((1, 2, 3), (3, 1, 2)))
        one, other = (self._run(input_ids, position_ids)[self._taps[-1][0]][:, 3:] for input_ids in behind)
        if not torch.equal(one, other):
            raise BadInputError(
                "this model's attention lets sequences in one row see each other; use capture.batching = 'padded', or "
                "another capture.attn_implementation"
            )
        self._isolates = True

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


def _check_positions(position_ids: torch.Tensor, input_ids: torch.Tensor) -> None:
    if position_ids.dtype != torch.int64 or position_ids.shape != input_ids.shape:
        raise BadInputError(
            f"positions must be int64 {list(input_ids.shape)} as the token ids are, not {position_ids.dtype} "
            f"{list(position_ids.shape)}"
        )
