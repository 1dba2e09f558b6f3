"""How long each stage of an ingestion takes on a machine, which of them binds, and what the accelerator does meanwhile.

The stages overlap: while one shard's batches run through the model and go to host memory, the shard before it is
encoded and uploaded. So the time is that of the slowest stage; where a CPU runs the model, forward passes and encoding
share its cores, and their seconds add up.
"""

import math
from dataclasses import dataclass

from actlake.jobs.plan.machine import Machine
from actlake.jobs.plan.rates import Rates, StoreRates
from actlake.jobs.plan.sizes import Sizes

#: Part of a link's peak that copies reach; an assumption, not measured.
_LINK_SHARE = 0.8

#: What each limit is called in messages.
NAMES = {"forward": "forward", "host": "PCIe", "encode": "encode", "nic": "NIC", "store": "store"}


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Seconds that all machines together spend in each stage if they do nothing else."""

    forward: float
    host: float
    encode: float
    nic: float
    store: float
    on_gpu: bool

    @property
    def total(self) -> float:
        """Seconds of the whole: those of the slowest stage, for they overlap."""
        return max(self.computing, self.encode, self.host, self.nic, self.store)

    @property
    def computing(self) -> float:
        """Seconds of the forward passes; without GPUs also those of encoding, which then takes the same cores."""
        return self.forward + (0.0 if self.on_gpu else self.encode)

    @property
    def binding(self) -> str:
        """The name of the slowest stage."""
        seconds = self.alone()
        return max(seconds, key=lambda name: seconds[name])

    def alone(self) -> dict[str, float]:
        """Return the seconds of each stage by name."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def idle(self) -> float:
        """The share of the time in which the accelerators compute nothing."""
        return 1 - self.forward / self.total if self.total else 0.0


def stages_of(
    machine: Machine,
    store: StoreRates,
    rates: Rates,
    *,
    sizes: Sizes,
    n_run: int,
    flops_per_token: float,
    tokens_per_s: float | None,
    mfu: float,
    dtype: str,
    codec: str,
    share: float,
    n_workers: int,
    passes: float = 1.0,
) -> Stages:
    """Return the seconds of each stage for ``share`` of a dataset, with ``n_workers`` on each machine.

    ``tokens_per_s`` is one worker's, where that is measured. ``passes`` are the forward passes of a batch, each counted
    as the part of the whole depth that it runs.
    """
    one = tokens_per_s or worker_rate(machine, rates, n_workers, flops_per_token, mfu, dtype)
    rate = n_workers * machine.count * one
    raw, stored = sizes.raw_nbytes * share, sizes.nbytes * share
    host = 0.0
    if machine.gpu is not None:
        host = raw / (machine.gpu.host_gb_s * 1e9 * _LINK_SHARE * machine.n_gpus * machine.count)
    return Stages(
        forward=n_run * share * passes / rate,
        host=host,
        encode=raw / 1e9 * rates.encode_s_per_gb(codec) / (machine.n_cpus * machine.count),
        nic=0.0 if machine.nic is None else stored / (machine.nic * machine.count),
        store=0.0
        if store.writes_per_s is None
        else ramped_seconds(sizes.n_objects * share, store.writes_per_s, store.doubling_s),
        on_gpu=machine.gpu is not None,
    )


def worker_rate(
    machine: Machine, rates: Rates, n_workers: int, flops_per_token: float, mfu: float, dtype: str
) -> float:
    """Return the tokens a second of one worker: of a GPU at ``mfu`` of its peak, else of its share of the cores.

    Where one worker has several GPUs they run one after another, layer by layer: as fast as one of them.
    """
    if machine.gpu is not None:
        return machine.gpu.tflops(dtype) * 1e12 * mfu / flops_per_token
    return rates.cpu.core_gflops * 1e9 * machine.n_cpus / n_workers / flops_per_token


def ramped_seconds(n_requests: float, per_s: float, doubling_s: float | None) -> float:
    """Return how long requests take at a rate that doubles every ``doubling_s`` seconds, in steps."""
    seconds, left, rate = 0.0, n_requests, per_s
    while doubling_s is not None and left > rate * doubling_s:
        seconds, left, rate = seconds + doubling_s, left - rate * doubling_s, rate * 2
    return seconds + left / rate


def peak_rate(n_requests: float, seconds: float, per_s: float | None, doubling_s: float | None) -> float | None:
    """Return the rate that a bucket has to be warmed to for requests spread evenly over ``seconds``; None: no limit."""
    if per_s is None or seconds <= 0:
        return None
    wanted = n_requests / seconds
    if wanted <= per_s or doubling_s is None:
        return per_s
    return per_s * 2.0 ** math.ceil(math.log2(wanted / per_s))
