"""How well a stream mixes, and what that means for training: beside a true global shuffle of the same rows.

    python benchmarks/bench_shuffle.py data/demo --plot docs/img/shuffle.svg

Mixing, on rows of sequences of 1,023 tokens in shuffle blocks of 262,144 (activations are zeros: only the row columns
are looked at), for several buffers:

- distinct sequences in a batch, over what a uniform draw without replacement gives in expectation;
- correlation of neighbouring batches: of how often each sequence comes in them, less the expectation and in units of
  its standard deviation. Independent batches have 0.

Training: the same autoencoder (``examples/topk_sae.py``) for the same steps on a scale model of a large dataset: the
rows of DATASET in shuffle blocks of 8,192 instead of 262,144, and with buffers of that scale. Each feed with several
seeds, judged on held-out rows; ``--plot`` draws the curves.
"""

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import Report, Row, make_parser
from tiling import make_spec, pick_points, tile, write_repeated
from torch import Tensor

import actlake
from actlake.examples import topk_sae

I64 = npt.NDArray[np.int64]
#: One point of a curve: steps done, share of the held-out variance that is not explained.
Curve = list[tuple[int, float]]
Feed = Callable[[int], Iterator[Tensor]]

SECTIONS = ("mixing", "training")
GLOBAL = "true global shuffle"


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How well some batches are mixed."""

    distinct: float
    correlation: float


# --- mixing ---


def bench_mixing(folder: Path, options: argparse.Namespace) -> tuple[list[Row], str]:
    spec = make_spec(["layers.0.resid_post"], width=640, rows_per_shard=options.rows_per_shard)
    ds = write_repeated(folder / "zeros", spec, options.shards, zeros=True, rows_per_sequence=options.sequence)
    lengths = np.bincount(np.arange(ds.n_rows) // options.sequence)
    ideal = ideal_distinct(lengths, options.batch_size)
    point, row_nbytes = ds.hook_points[0], ds.spec.arrays()[ds.hook_points[0]].nbytes_per_row
    buffers: dict[str, int | str] = {"default, 1 GiB": "1GiB", "none (direct)": 0}
    buffers |= {f"{n_rows:,} rows": n_rows * row_nbytes for n_rows in options.buffers}
    found: dict[str, Mixing] = {}
    for name, nbytes in buffers.items():
        stream = ds.stream(point, batch_size=options.batch_size, buffer_bytes=nbytes)
        sequences = (batch.sequence.numpy() for batch in stream)
        found[name] = mixing(islice(sequences, options.batches), lengths, options.batch_size)
    order = np.random.default_rng(0).permutation(ds.n_rows)[: options.batches * options.batch_size]
    cut = np.split(order // options.sequence, range(options.batch_size, len(order), options.batch_size))
    found[GLOBAL] = mixing(iter(cut), lengths, options.batch_size)
    rows: list[Row] = [
        {
            "buffer": name,
            "distinct sequences": f"{got.distinct:,.0f}",
            "over the ideal": got.distinct / ideal,
            "correlation of neighbours": f"{got.correlation:.3f}",
        }
        for name, got in found.items()
    ]
    note = (
        f"{ds.n_rows:,} rows in {len(lengths):,} sequences; batches of {options.batch_size:,}, the first "
        f"{options.batches} of an epoch; ideal {ideal:,.0f} distinct sequences."
    )
    return rows, note


def ideal_distinct(lengths: I64, batch_size: int) -> float:
    """Return the expected number of distinct sequences among ``batch_size`` rows drawn without replacement.

    A sequence of n of N rows is missed with probability C(N - n, B) / C(N, B) (hypergeometric distribution).
    """
    n_rows = int(lengths.sum())

    def missed(length: int) -> float:
        if n_rows - length < batch_size:
            return 0.0
        parts = (n_rows - length, n_rows - batch_size), (n_rows - length - batch_size, n_rows)
        return math.exp(sum(math.lgamma(x + 1) for x in parts[0]) - sum(math.lgamma(x + 1) for x in parts[1]))

    return sum(
        int(count) * (1 - missed(int(n))) for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
    )


def mixing(batches: Iterator[I64], lengths: I64, batch_size: int) -> Mixing:
    """Return how well batches, each the sequence numbers of its rows, are mixed."""
    expected = batch_size * lengths / lengths.sum()
    distinct, correlations, before = [], [], None
    for sequences in batches:
        counts = np.bincount(sequences, minlength=len(lengths))
        distinct.append(int((counts > 0).sum()))
        deviation = (counts - expected) / np.sqrt(expected)
        if before is not None:
            correlations.append(float(np.corrcoef(before, deviation)[0, 1]))
        before = deviation
    return Mixing(distinct=statistics.mean(distinct), correlation=statistics.mean(correlations))


# --- training ---


def feeds(ds: actlake.ActivationDataset, point: str, options: argparse.Namespace) -> dict[str, Feed]:
    """Return what feeds the autoencoder, by name; each makes endless batches from a seed."""
    rows = ds.tensor(point, slice(0, ds.n_rows))
    columns = ds.rows(slice(0, ds.n_rows))
    in_order = rows[torch.from_numpy(np.lexsort((columns["position"], columns["sequence"])))]
    row_nbytes = ds.spec.arrays()[point].nbytes_per_row
    size = options.sae_batch_size

    def shuffled(seed: int) -> Iterator[Tensor]:
        chance = torch.Generator().manual_seed(seed)
        while True:
            yield from rows[torch.randperm(len(rows), generator=chance)[: len(rows) // size * size]].split(size)

    def unshuffled(seed: int) -> Iterator[Tensor]:
        start = seed * size
        while True:
            yield in_order[torch.arange(start, start + size) % len(in_order)]
            start += size

    def streamed(**settings: Any) -> Feed:
        return lambda seed: (
            batch[point] for batch in ds.stream(point, batch_size=size, seed=seed, epochs=None, **settings)
        )

    return {
        GLOBAL: shuffled,
        "actlake, default": streamed(),
        f"actlake, buffer of {2 * options.block:,} rows": streamed(buffer_bytes=2 * options.block * row_nbytes),
        "actlake, direct": streamed(buffer_bytes=0),
        "not shuffled": unshuffled,
    }


def bench_training(folder: Path, options: argparse.Namespace) -> tuple[list[Row], dict[str, list[Curve]]]:
    source = actlake.open(options.dataset)
    point = pick_points(source, 1, options.point)[0]
    scaled = tile(source, folder / "scaled", source.n_rows, [point], rows_per_shard=options.block, by_row=True)
    heldout = source.heldout.tensor(point, slice(0, min(4096, source.heldout.n_rows)))
    curves: dict[str, list[Curve]] = {}
    for name, feed in feeds(scaled, point, options).items():
        curves[name] = [_train(feed(seed), scaled, point, heldout, seed, options) for seed in range(options.seeds)]
    ends = {name: [curve[-1][1] for curve in found] for name, found in curves.items()}
    base = statistics.mean(ends[GLOBAL])
    # Of the seeds of one feed, pooled over the feeds: three seeds alone tell little.
    pooled = [statistics.variance(losses) for losses in ends.values()] if options.seeds > 1 else [math.nan]
    noise = math.sqrt(statistics.mean(pooled))
    rows: list[Row] = [
        {
            "feed": name,
            "unexplained at the end": f"{statistics.mean(losses):.4f}",
            "per seed": ", ".join(f"{loss:.4f}" for loss in losses),
            "over the global shuffle": f"{statistics.mean(losses) / base:.3f}",
            "difference, in deviations of the seeds": f"{(statistics.mean(losses) - base) / noise:.1f}",
        }
        for name, losses in ends.items()
    ]
    return rows, curves


def _train(
    batches: Iterator[Tensor],
    ds: actlake.ActivationDataset,
    point: str,
    heldout: Tensor,
    seed: int,
    options: argparse.Namespace,
) -> Curve:
    torch.manual_seed(seed)
    moments = ds.statistics(point)
    curve: Curve = []
    topk_sae.train(
        batches,
        heldout,
        torch.from_numpy(moments.mean),
        torch.from_numpy(moments.variance).sqrt(),
        steps=options.steps,
        n_latents=options.latents,
        k=min(96, options.latents),
        on_step=lambda step, explained: curve.append((step, 1 - explained)),
    )
    return curve


def plot(curves: dict[str, list[Curve]], file: Path) -> None:
    """Draw the curves: the mean of the seeds, and the band between the best and the worst."""
    import matplotlib as mpl

    mpl.use("agg")
    # The same curves give the same file.
    mpl.rcParams["svg.hashsalt"] = "actlake"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, found in curves.items():
        steps = [step for step, _ in found[0]]
        losses = np.array([[loss for _, loss in curve] for curve in found])
        (line,) = axes.plot(steps, losses.mean(axis=0), label=name, linestyle="--" if name == GLOBAL else "-")
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(
        xlabel="steps",
        ylabel="variance of held-out rows not explained",
        yscale="log",
        title=f"The same autoencoder, fed in different orders ({len(next(iter(curves.values())))} seeds)",
    )
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


# --- the command ---


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("dataset", nargs="?", default="data/demo", help="rows to train on")
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the training curves (.svg or .png)")
    mixed = parser.add_argument_group("mixing")
    mixed.add_argument("--shards", type=int, default=8)
    mixed.add_argument("--rows-per-shard", type=int, default=262_144, help="and per shuffle block")
    mixed.add_argument("--sequence", type=int, default=1023, help="rows of a sequence")
    mixed.add_argument("--batch-size", type=int, default=4096)
    mixed.add_argument("--buffers", type=int, nargs="*", default=[16_384, 65_536, 262_144], help="in rows")
    mixed.add_argument("--batches", type=int, default=128, help="how many are looked at")
    training = parser.add_argument_group("training")
    training.add_argument("--point", help="hook point (default: layers.9.resid_post)")
    training.add_argument("--seeds", type=int, default=3)
    training.add_argument("--steps", type=int, default=100)
    training.add_argument("--sae-batch-size", type=int, default=2048)
    training.add_argument("--latents", type=int, default=2048)
    training.add_argument("--block", type=int, default=8192, help="rows of a shuffle block of the scale model")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    wanted = options.only or SECTIONS
    with Report(options) as report, tempfile.TemporaryDirectory() as temporary:
        if "mixing" in wanted:
            rows, note = bench_mixing(Path(temporary), options)
            report.table("Mixing", rows, note)
        if "training" in wanted:
            rows, curves = bench_training(Path(temporary), options)
            note = f"{options.steps} steps of {options.sae_batch_size:,} rows, {options.latents:,} latents."
            report.table("Loss after the same steps", rows, note)
            if options.plot:
                plot(curves, options.plot)


if __name__ == "__main__":
    main()
