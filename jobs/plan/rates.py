"""Machine rates and prices: ``rates.toml``, checked; every number there has a source and a date."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from actlake.storage.errors import BadInputError, NotFoundError, UnknownNameError, nearest

_Entry = TypeVar("_Entry")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator: dense peak rates in Tflop/s, its memory in GB, GB/s of its link to host memory."""

    bfloat16_tflops: float
    float32_tflops: float
    memory_gb: float
    host_gb_s: float
    source: str
    date: str
    names: tuple[str, ...] = ()

    def tflops(self, dtype: str) -> float:
        """Return the peak of the dtype that the model runs in."""
        return self.bfloat16_tflops if dtype == "bfloat16" else self.float32_tflops


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """One kind of machine; ``nic_gb_s`` is what reaches an object store, prices are dollars an hour."""

    gpu: str
    n_gpus: int
    n_cpus: int
    memory_gib: float
    nic_gb_s: float
    hour: float
    spot_hour: float
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class StoreRates:
    """One object store: prices in dollars, request rates at the start, doubling every ``doubling_s`` (None: never).

    ``bills_parts``: each part of a large object is a request of class A. ``part_nbytes``: the size of parts where the
    client has its own, and ``whole_nbytes`` the largest object that it sends in one request.
    """

    gib_month: float
    class_a_per_1000: float
    class_b_per_1000: float
    egress_gib: float
    source: str
    date: str
    names: tuple[str, ...] = ()
    writes_per_s: float | None = None
    reads_per_s: float | None = None
    doubling_s: float | None = None
    read_gb_s: float | None = None
    bills_parts: bool = False
    part_nbytes: int | None = None
    whole_nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class CpuRates:
    """What one CPU core does: forward passes in Gflop/s; the codec and the statistics in CPU seconds a GB."""

    core_gflops: float
    codec_s_per_gb: float
    statistics_s_per_gb: float
    source: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The whole file; ``ratios`` are uncompressed over stored bytes by dtype, then stream."""

    read: str
    gpus: Mapping[str, Gpu]
    machines: Mapping[str, MachineRates]
    stores: Mapping[str, StoreRates]
    cpu: CpuRates
    mfu: float
    failures_per_gpu_hour: float
    bytes_per_token: float
    tokens_per_document: float
    ratios: Mapping[str, Mapping[str, float]]
    sources: Mapping[str, str]

    def machine(self, name: str) -> MachineRates:
        """Return a machine by name; ``UnknownNameError`` lists those that there are."""
        if name not in self.machines:
            raise UnknownNameError(f"no machine {name!r} in the rates{nearest(name, self.machines)}; or 'here'")
        return self.machines[name]

    def store(self, protocol: str) -> tuple[str, StoreRates]:
        """Return the name and the rates of a protocol's store; one without rates is priced as a disk of one's own."""
        for name, store in self.stores.items():
            if protocol in store.names:
                return name, store
        return "local", self.stores["local"]

    def gpu_named(self, text: str) -> str | None:
        """Return which accelerator a device name such as ``"NVIDIA H100 80GB HBM3"`` means, None where none fits."""
        for key, gpu in self.gpus.items():
            if any(name in text for name in gpu.names):
                return key
        return None

    def encode_s_per_gb(self, codec: str) -> float:
        """Return the CPU seconds from a GB of rows to encoded chunks and statistics."""
        return self.cpu.statistics_s_per_gb + (0.0 if codec == "none" else self.cpu.codec_s_per_gb)

    def ratio(self, stream: str, dtype: str, codec: str) -> float:
        """Return the expected ratio of a stream: 1 without compression."""
        return 1.0 if codec == "none" else self.ratios[dtype][stream]


def read_rates(path: str | Path | None = None) -> Rates:
    """Read a rates file, by default the one that comes with actlake.

    Raises ``NotFoundError`` where it is absent, ``BadInputError`` naming the table and key where it is wrong.
    """
    try:
        text = (files("actlake.jobs.plan") / "rates.toml" if path is None else Path(path)).read_text(encoding="utf-8")
        return _rates(tomllib.loads(text))
    except FileNotFoundError as error:
        raise NotFoundError(f"no rates file {str(path)!r}; leave --rates out for the one that comes along") from error
    except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"the rates file {path or 'rates.toml'} is wrong: {error!r}; compare it with rates.toml"
        ) from (error)


def _rates(table: Mapping[str, Any]) -> Rates:
    ratios = {dtype: {k: v for k, v in of.items() if k not in _ABOUT} for dtype, of in table["ratios"].items()}
    found = Rates(
        read=table["read"],
        gpus={name: _entry(Gpu, of, f"gpus.{name}") for name, of in table["gpus"].items()},
        machines={name: _entry(MachineRates, of, f"machines.{name}") for name, of in table["machines"].items()},
        stores={name: _entry(StoreRates, of, f"stores.{name}") for name, of in table["stores"].items()},
        cpu=_entry(CpuRates, table["cpu"], "cpu"),
        mfu=table["gpu_run"]["mfu"],
        failures_per_gpu_hour=table["failures"]["per_gpu_hour"],
        bytes_per_token=table["text"]["bytes_per_token"],
        tokens_per_document=table["text"]["tokens_per_document"],
        ratios=ratios,
        sources={
            "mfu": table["gpu_run"]["source"],
            "failures": table["failures"]["source"],
            "text": table["text"]["source"],
            **{f"ratios.{dtype}": of["source"] for dtype, of in table["ratios"].items()},
        },
    )
    for name, machine in found.machines.items():
        if machine.gpu not in found.gpus:
            raise BadInputError(f"machines.{name}.gpu = {machine.gpu!r} is none of {', '.join(found.gpus)}")
    return found


_ABOUT = ("source", "date")


def _entry(cls: type[_Entry], values: Mapping[str, Any], where: str) -> _Entry:
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise BadInputError(f"unknown key '{where}.{key}'{nearest(key, known)}")
        if isinstance(value, int | float) and value < 0:
            raise BadInputError(f"{where}.{key} = {value} must not be negative")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except TypeError as error:
        raise BadInputError(f"{where}: {error}; every rate needs its source and date") from error
