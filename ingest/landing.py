"""Brings the rows of a batch from where the model computed them to their places in a shard's memory.

That happens while the next batch runs. From a GPU the rows of a batch, gathered there, go hook point by hook point
through pinned buffers on a stream of their own, and from each buffer to their places by a thread of its own: pageable
memory is copied at a fraction of the link's speed, and a link is faster than one thread scatters.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actlake.ingest.batch_feed import LaidBatch

# Shapes: N rows of a batch that are rows of the shard, R rows of the shard, D width.

#: Threads that scatter what comes from a GPU, at most; each has two buffers: one is filled while it empties the other.
_MOST_SCATTERERS = 4

#: Hears of a batch that has passed: its rows, and the seconds of its forward pass.
Heard = Callable[[int, float], None]


@dataclass
class _Link:
    """A stream for copies from one GPU, and its pinned buffers."""

    device: torch.device
    n_buffers: int
    stream: Any = None
    buffers: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * self.n_buffers

    def copy(self, rows_ND: torch.Tensor, number: int) -> tuple[torch.Tensor, Any]:
        """Start copying rows into a pinned buffer; return it, and the event that says when they are there."""
        nbytes = rows_ND.numel() * rows_ND.element_size()
        if self.buffers[number].numel() < nbytes:
            self.buffers[number] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        landed_ND = self.buffers[number][:nbytes].view(rows_ND.dtype).view(rows_ND.shape)
        with torch.cuda.stream(self.stream):
            landed_ND.copy_(rows_ND, non_blocking=True)
            there = torch.cuda.Event(blocking=True)
            there.record(self.stream)
        return landed_ND, there


class Lander:
    """Lands one batch at a time, behind the model; used by the thread whose batches run."""

    def __init__(self, n_threads: int = 1) -> None:
        n_scatterers = max(1, min(_MOST_SCATTERERS, n_threads // 2))
        self._lander = ThreadPoolExecutor(1, thread_name_prefix="actlake-land")
        self._scatterers = ThreadPoolExecutor(n_scatterers, thread_name_prefix="actlake-scatter")
        self._n_buffers = 2 * n_scatterers
        self._links: dict[torch.device, _Link] = {}
        self._last: Future[None] | None = None
        self._passed = 0.0
        #: Seconds of copies from GPUs and to their places so far, without those in which the model was waited for.
        self.landed_s = 0.0

    def send(
        self,
        acts: Mapping[str, torch.Tensor],
        batch: LaidBatch,
        memory: Mapping[str, npt.NDArray[Any]],
        started: float,
        heard: Heard,
    ) -> Future[None]:
        """Begin to land a batch whose forward pass began at ``started``; return the future of its landing.

        Waits until the batch before has landed, whoever sent it. ``memory`` has [R + 1, D] of each hook point that is
        wanted, of bfloat16 the bits; the last row is for what is no row of the shard. ``heard`` is called once the
        forward pass has ended.
        """
        ended = time.perf_counter()
        if self._last is not None:
            wait([self._last])
        kept = _kept(dict(acts), memory, batch)
        # On a GPU what was not gathered is free for the next pass.
        del acts
        marks = [_mark(device) for device in {rows.device for rows in kept.values()} if device.type == "cuda"]

        def land() -> None:
            for mark in marks:
                mark.synchronize()
            now = time.perf_counter() if marks else ended
            # A GPU begins a pass when it has ended the one before, however early that was started.
            heard(len(batch.target_N), now - max(started, self._passed))
            self._passed = now
            begun = time.perf_counter()
            self._land(kept, batch, memory)
            self.landed_s += time.perf_counter() - begun

        self._last = self._lander.submit(land)
        return self._last

    def _land(self, kept: dict[str, torch.Tensor], batch: LaidBatch, memory: Mapping[str, npt.NDArray[Any]]) -> None:
        scattering: dict[int, Future[None]] = {}
        try:
            for place, (name, into_RD) in enumerate(memory.items()):
                rows_ND = kept.pop(name)
                if rows_ND.device.type != "cuda":
                    scatter(rows_ND.cpu(), batch.target_BT, into_RD)
                    continue
                number = place % self._n_buffers
                if number in scattering:
                    scattering.pop(number).result()
                landed_ND, there = self._link(rows_ND.device).copy(rows_ND, number)
                # ``rows_ND`` goes along, so that its memory on the GPU is not used again before it is copied.
                scattering[number] = self._scatterers.submit(_scatter_from, landed_ND, there, rows_ND, batch, into_RD)
            for future in scattering.values():
                future.result()
        finally:
            wait(scattering.values())

    def _link(self, device: torch.device) -> _Link:
        if device not in self._links:
            self._links[device] = _Link(device, self._n_buffers)
        return self._links[device]


def _kept(acts: dict[str, torch.Tensor], names: Iterable[str], batch: LaidBatch) -> dict[str, torch.Tensor]:
    """Take the rows of a batch out of ``acts``: gathered where they are on a GPU; elsewhere all that it ran."""
    found, where = {}, dict[torch.device, torch.Tensor]()
    for name in names:
        acts_BTD = acts.pop(name)
        found[name] = acts_BTD.reshape(-1, acts_BTD.shape[-1])
        if (device := acts_BTD.device).type == "cuda":
            if device not in where:
                where[device] = batch.source_N.pin_memory().to(device, non_blocking=True)
            found[name] = found[name].index_select(0, where[device])
    return found


def _mark(device: torch.device) -> Any:
    """Return an event that passes when a GPU has done all that it was given so far."""
    mark = torch.cuda.Event(blocking=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def _scatter_from(
    landed_ND: torch.Tensor, there: Any, _held: torch.Tensor, batch: LaidBatch, into_RD: npt.NDArray[Any]
) -> None:
    there.synchronize()
    scatter(landed_ND, batch.target_N, into_RD)


def scatter(rows_ND: torch.Tensor, target_N: torch.Tensor, into_RD: npt.NDArray[Any]) -> None:
    """Write rows in host memory to their places in a shard's memory; releases the GIL."""
    bits = np.dtype(f"<u{rows_ND.element_size()}")
    values_ND = rows_ND.view(torch.int16 if bits.itemsize == 2 else torch.int32).numpy().view(bits)
    # Twice as fast as torch's index_copy_.
    into_RD.view(bits)[target_N.numpy()] = values_ND
