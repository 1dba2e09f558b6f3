"""What the stored statistics say of each hook point: norms, mean against spread, channels that stand out, bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actlake.jobs.report.sample import F64, RowSample
from actlake.shards.dataset import ActivationDataset
from actlake.storage.hookpoints import HookPoint
from actlake.storage.moments import Moments, OutlierChannel
from actlake.storage.norms import NormHistogram, OutlierRow

#: Shards whose statistics are read at most. With rows in random order, some shards are a fair sample of all; 5,376
#: channels of 248 hook points are 22 MB of statistics a shard.
_MAX_SHARDS = 128

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_TOP_CHANNELS = 8

#: Of each hook point, how many channels get a row in the map of channels, and rows of that map at most.
_MAP_CHANNELS, _MAP_ROWS = 3, 24


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Rows by norm: ``counts[i]`` of norms from ``edges[i]`` to ``edges[i + 1]``, eight bins an octave."""

    edges: Sequence[float]
    counts: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One hook point over the committed rows; what needs a row is None where none is known.

    ``exact_norms`` says whether histogram and quantiles are of all rows: datasets of an earlier actlake have none
    stored, and show those of the sample.
    """

    name: str
    layer: int
    stream: str
    width: int
    rows_per_chunk: int
    nbytes: int
    ratio: float | None
    n_rows: int
    norm_mean: float | None
    norm_rms: float | None
    unit_scale: float | None
    mean_to_spread: float | None
    channels: Sequence[OutlierChannel]
    exact_norms: bool
    histogram: Histogram | None
    quantiles: Sequence[float] | None
    n_nonfinite: int | None
    outlier_rows: Sequence[OutlierRow]


@dataclass(frozen=True, kw_only=True)
class ChannelMap:
    """Shares of the mean squared norm of one stream's notable channels: ``shares[i][j]`` at layer i, channel j."""

    channels: Sequence[int]
    layers: Sequence[int]
    shares: Sequence[Sequence[float]]


def stat_shards(ds: ActivationDataset) -> list[int]:
    """Return the committed shards whose statistics the page is of: all, or 128 at even distances."""
    shards = ds.reader.manifest.shards
    if len(shards) <= _MAX_SHARDS:
        return shards
    return [shards[place] for place in np.linspace(0, len(shards) - 1, _MAX_SHARDS).round().astype(int)]


def points(
    ds: ActivationDataset, shards: Sequence[int], sample: RowSample
) -> tuple[list[Point], dict[str, ChannelMap]]:
    """Return the facts of every hook point, in the spec's order, and by stream the map of its notable channels."""
    stored = ds.reader.manifest.nbytes_by_array()
    statistics = _statistics(ds, shards)
    found, energies = [], {}
    for name in ds.hook_points:
        moments = statistics[name]
        energies[name] = _energy(moments)
        found.append(_point(ds, name, moments, stored.get(name, 0), sample.norms.get(name)))
    streams = dict.fromkeys(point.stream for point in found)
    maps = {stream: _channel_map([p for p in found if p.stream == stream], energies) for stream in streams}
    return found, maps


def _statistics(ds: ActivationDataset, shards: Sequence[int]) -> dict[str, Moments]:
    """Merge the shards' statistics, each file read once for all hook points (``ds.statistics`` reads them for one)."""
    found = {point.name: Moments.empty(point.width) for point in ds.spec.hook_points}
    for shard in shards:
        of_shard = ds.reader.statistics(shard)
        found = {name: moments.merge(of_shard[name]) for name, moments in found.items()}
    return found


def _point(ds: ActivationDataset, name: str, moments: Moments, nbytes: int, norms: F64 | None) -> Point:
    array, hook = ds.spec.arrays()[name], HookPoint.parse(name)
    known, rms = moments.count > 0, math.sqrt(moments.mean_squared_norm)
    spread = math.sqrt(float(moments.variance.sum()))
    histogram = moments.norm_histogram
    if histogram is None and norms is not None:
        histogram = NormHistogram.of(norms)
    return Point(
        name=name,
        layer=hook.layer,
        stream=hook.stream,
        width=array.width or 1,
        rows_per_chunk=array.rows_per_chunk,
        nbytes=nbytes,
        ratio=ds.n_rows * array.nbytes_per_row / nbytes if nbytes else None,
        n_rows=moments.count,
        norm_mean=moments.norm_mean if known else None,
        norm_rms=rms if known else None,
        unit_scale=moments.unit_scale if rms else None,
        mean_to_spread=float(np.linalg.norm(moments.mean)) / spread if spread else None,
        channels=moments.outlier_channels(0.0)[:_TOP_CHANNELS] if known else (),
        exact_norms=moments.norm_histogram is not None,
        histogram=_histogram(histogram),
        quantiles=[histogram.quantile(q) for q in _QUANTILES] if histogram is not None and histogram.count else None,
        n_nonfinite=moments.n_nonfinite,
        outlier_rows=moments.outlier_rows or (),
    )


def _energy(moments: Moments) -> F64:
    """Share of the mean squared norm by channel; sums to 1, or zeros where all rows are."""
    energy: npt.NDArray[np.float64] = moments.variance + moments.mean**2
    total = energy.sum()
    return energy / total if total else energy


def _histogram(norms: NormHistogram | None) -> Histogram | None:
    if norms is None or not norms.count:
        return None
    edges, counts = norms.coarse()
    return Histogram(edges=edges.tolist(), counts=counts.tolist())


def _channel_map(found: Sequence[Point], energies: Mapping[str, F64]) -> ChannelMap:
    best: dict[int, float] = {}
    for point in found:
        for item in point.channels[:_MAP_CHANNELS]:
            best[item.channel] = max(best.get(item.channel, 0.0), item.share)
    chosen = sorted(sorted(best, key=lambda channel: -best[channel])[:_MAP_ROWS])
    shares = [[round(float(energies[point.name][channel]), 5) for channel in chosen] for point in found]
    return ChannelMap(channels=chosen, layers=[point.layer for point in found], shares=shares)
