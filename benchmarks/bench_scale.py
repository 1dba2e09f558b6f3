"""What a run's driver costs as shards become many: ``python benchmarks/bench_scale.py --sizes 1k 10k 100k 1.35M``.

A null model and a null store: the workers are real Ray actors that load and run no model and store neither arrays nor
statistics; each returns the record of its shard, of ``--points`` hook points and the four row columns. Where a phase
commits, the workers write real commit records to a folder, and the driver compacts them. The phases, each in a process
of its own whose CPU time and peak memory are the driver's alone:

- plan: what is missing of a dataset without commits, and every task once;
- dispatch: shards through the Ray engine, records back, nothing stored;
- commit: the same, with commits and their compaction beside it;
- compact: the groups of these commits once more, from a listing, as the end of a run does where none was written;
- finish: the end of a run of that size whose groups are compacted: index and totals;
- resume: what is missing where half of the shards are committed, as a killed run leaves it: the first half of the
  groups compacted, and 1,023 commits of the next one;
- resume-every-second: the same where half of a Slurm array has run: no group is whole, so none is compacted.

Dispatch and commit hand out the first ``--handed`` shards at most, of a plan of the whole size: their memory is that of
the size (but for the 8 bytes of each shard that is not handed out), their rate that of the shards handed out.
"""

import argparse
import math
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
from bench_manifest import group_table, make_spec

from actlake.jobs.compaction import Compactor
from actlake.jobs.engines import ray_engine
from actlake.jobs.engines.events import ShardCommitted
from actlake.jobs.engines.ray_pool import PoolOptions
from actlake.jobs.engines.ray_worker import RayWorker
from actlake.jobs.missing import MissingShards, SplitShards
from actlake.jobs.work import SHARDS_IN_FLIGHT, Task, WorkOrder
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest_files import group_bytes, group_key, to_records
from actlake.storage.records import GROUP_SHARDS, ShardRecord, commit, commit_key
from actlake.storage.stores import Store

#: What the project wants of the largest size.
MOST_MIB, LEAST_PER_S, MOST_RESUME_S = 1024, 500, 60

#: Sizes and names of the phases that grow with the size.
PHASES = ("plan", "dispatch", "commit", "compact", "finish", "resume", "resume-every-second")


def header_of(n_shards: int, n_points: int) -> Header:
    """Return the header of a dataset of whole shards."""
    spec = make_spec()
    spec = replace(spec, hook_points=spec.hook_points[:n_points])
    return Header(spec=spec, n_rows=n_shards * spec.rows_per_shard, corpus="../corpus")


def record_of(header: Header) -> ShardRecord:
    """Return the record of shard 0, as a worker makes it."""
    return next(to_records(group_table(header.spec, range(1), np.random.default_rng(0))))


def write_groups(store: Store, header: Header, n_groups: int) -> None:
    """Write compacted groups as the driver of a run does; the numbers of their shards are all that differs."""
    table = group_table(header.spec, range(GROUP_SHARDS), np.random.default_rng(0))
    for group in range(n_groups):
        shards = np.arange(group * GROUP_SHARDS, (group + 1) * GROUP_SHARDS)
        for name, values in (("shard", shards), ("first_row", shards * header.spec.rows_per_shard)):
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [values])
        store.write(group_key(group), group_bytes(table))


class NullWorker(RayWorker):
    """Returns the record of a shard that nobody built, and commits it where there is a dataset."""

    def start(self) -> int:
        self._store = Store(self._order.dataset) if self._order.dataset else None
        self._record = record_of(header_of(1, len(self._order.points)))
        return SHARDS_IN_FLIGHT

    def build(self, task: Task) -> ShardRecord:
        record = replace(self._record, shard=task.shard, first_row=task.shard * task.n_rows)
        if self._store is not None:
            commit(self._store, record)
        return record


def order_of(header: Header, url: str) -> WorkOrder:
    """Return what the null workers need: where they commit, "" for nowhere, and how many hook points there are."""
    return WorkOrder(
        dataset=url, corpus="", model="", revision=None, fingerprint="", points=header.spec.point_names,
        dtype="bfloat16", device="cpu", n_threads=1,
    )  # fmt: skip


# --- phases: each leaves how many shards it was about --------------------------------------------------------------


def plan(url: str, header: Header, handed: int) -> int:
    """Find what is missing of an empty dataset, and see every task once."""
    missing = MissingShards.find(Store(url), {"train": header})
    return sum(1 for _ in missing)


def dispatch(url: str, header: Header, handed: int) -> int:
    """Hand shards to actors, and hear of each."""
    return sum(1 for _ in _commits("", header, handed))


def commit_them(url: str, header: Header, handed: int) -> int:
    """Hand shards to actors that commit them, and compact their groups meanwhile."""
    with Compactor(Store(url), {"train": header}, _first(header, handed), note=_fail) as compactor:
        n = 0
        for event in _commits(url, header, handed):
            compactor.event(event)
            n += 1
    return n


def compact(url: str, header: Header, handed: int) -> int:
    """Finish the dataset of the commits, whose groups have been taken away."""
    return len(finish(Store(url), header))


def resume(url: str, header: Header, handed: int) -> int:
    """Find what is missing of a dataset."""
    return len(MissingShards.find(Store(url), {"train": header}))


def _commits(url: str, header: Header, handed: int) -> Iterator[ShardCommitted]:
    """Yield the commits of a run; the clock runs from the first one, when the workers are ready, to the last."""
    options = PoolOptions(least=2, most=2)
    events = ray_engine.run(
        order_of(header, url), _first(header, handed), options=options, address=None, note=_fail, worker=NullWorker
    )
    n = 0
    with closing(events):
        for event in events:
            if isinstance(event, ShardCommitted):
                n += 1
                if n == 1:
                    CLOCK.begin()
                yield event
        CLOCK.end()


def _first(header: Header, handed: int) -> MissingShards:
    space = header.spec.row_space(header.n_rows)
    return MissingShards(splits={"train": SplitShards(space=space, shards=np.arange(min(handed, space.n_shards)))})


def _fail(text: str) -> None:
    raise RuntimeError(text)


class Clock:
    """Wall and CPU seconds of this process, from the last ``begin`` to the first ``end`` after it."""

    def begin(self) -> None:
        self._from, self.passed = (time.perf_counter(), time.process_time()), None

    def end(self) -> tuple[float, float]:
        if self.passed is None:
            self.passed = time.perf_counter() - self._from[0], time.process_time() - self._from[1]
        return self.passed

    passed: tuple[float, float] | None


CLOCK = Clock()

RUN = {
    "plan": plan,
    "dispatch": dispatch,
    "commit": commit_them,
    "compact": compact,
    "finish": compact,
    "resume": resume,
    "resume-every-second": resume,
}


def measure(phase: str, url: str, n_shards: int, n_points: int, handed: int) -> None:
    """Leave what a phase took in this process."""
    header = header_of(n_shards, n_points)
    CLOCK.begin()
    n = RUN[phase](url, header, handed)
    seconds, cpu_s = CLOCK.end()
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    harness.leave_result({"n": n, "s": seconds, "cpu_s": cpu_s, "mib": mib})


# --- all of them ---------------------------------------------------------------------------------------------------


def size_of(text: str) -> int:
    """Read a number of shards such as 10k or 1.35M."""
    factor = {"k": 1_000, "M": 1_000_000}.get(text[-1:], 1)
    return round(float(text.rstrip("kM")) * factor)


class Size:
    """The phases of one size, each with the dataset that it wants."""

    def __init__(self, n_shards: int, folder: Path, options: argparse.Namespace) -> None:
        self.n_shards, self.folder, self.options = n_shards, folder, options
        self.header = header_of(n_shards, options.points)
        self.found: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, dict[str, float]]:
        """Measure the phases that are asked for."""
        steps: dict[tuple[str, ...], Callable[[], None]] = {
            ("plan",): lambda: self._child("plan", self._fresh("empty", self.header).url),
            ("dispatch",): lambda: self._child("dispatch", ""),
            ("commit", "compact"): self._commit,
            ("finish",): self._finish,
            ("resume",): self._resume,
            ("resume-every-second",): self._resume_every_second,
        }
        for phases, step in steps.items():
            if set(phases).intersection(self.options.only):
                step()
        return self.found

    def _child(self, phase: str, url: str, size: int | None = None) -> None:
        options = self.options
        words = ["--measure", phase, url, "--sizes", str(size or self.n_shards)]
        words += ["--points", options.points, "--handed", options.handed]
        shown = self.found[phase] = harness.run_child(__file__, words)
        text = f"{self.n_shards:,} {phase}: {shown['s']:.1f} s, {shown['mib']:.0f} MiB"
        print(text, file=sys.stderr, flush=True)

    def _fresh(self, name: str, of: Header) -> Store:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        store = Store(self.folder / name)
        prepare(store, of)
        return store

    def _commit(self) -> None:
        store = self._fresh("committed", self.header)
        self._child("commit", store.url)
        # What was handed out, as a dataset of its own, without its groups.
        n_handed = min(self.n_shards, self.options.handed)
        left = self._fresh("listed", header_of(n_handed, self.options.points))
        (self.folder / "committed/commits").rename(self.folder / "listed/commits")
        self._child("compact", left.url, n_handed)
        for name in ("committed", "listed"):
            shutil.rmtree(self.folder / name)

    def _finish(self) -> None:
        store, n_groups = self._fresh("finished", self.header), self.n_shards // GROUP_SHARDS
        write_groups(store, self.header, n_groups)
        write_commits(store, self.header, range(n_groups * GROUP_SHARDS, self.n_shards))
        if n_groups:
            # Groups are compacted while their commits are there; of these the driver asks for their names alone.
            self._child("finish", store.url)
        shutil.rmtree(self.folder / "finished")

    def _resume(self) -> None:
        store, n_half = self._fresh("half", self.header), self.n_shards // 2 // GROUP_SHARDS
        write_groups(store, self.header, n_half)
        first = n_half * GROUP_SHARDS
        name_commits(store, range(first))
        stop = min(first + GROUP_SHARDS - 1, self.n_shards) if n_half else self.n_shards // 2
        write_commits(store, self.header, range(first, stop))
        self._child("resume", store.url)
        shutil.rmtree(self.folder / "half")

    def _resume_every_second(self) -> None:
        store = self._fresh("array", self.header)
        write_commits(store, self.header, range(0, self.n_shards, 2))
        self._child("resume-every-second", store.url)
        shutil.rmtree(self.folder / "array")


def name_commits(store: Store, shards: range) -> None:
    """Put empty objects where the commits of compacted groups are: who resumes asks for their names alone."""
    for shard in shards:
        path = Path(store.path(commit_key(shard)))
        if shard % GROUP_SHARDS == 0:
            path.parent.mkdir(parents=True)
        path.touch()


def write_commits(store: Store, header: Header, shards: range) -> None:
    """Write commit records; not with ``commit``, which waits for the disk."""
    record = record_of(header)
    for shard in shards:
        path = Path(store.path(commit_key(shard)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(replace(record, shard=shard, first_row=shard * header.spec.rows_per_shard).to_bytes())


def rows_of(results: dict[int, dict[str, dict[str, float]]]) -> Iterator[dict[str, Any]]:
    """Yield a row of the table for each size and phase, with the growth from the size before."""
    for phase in PHASES:
        before: tuple[float, float] | None = None
        for size, found in results.items():
            if phase not in found:
                continue
            one = found[phase]
            n = one["n"] if phase in ("dispatch", "commit", "compact") else size
            grown = before is not None and n > before[0]
            yield {
                "phase": phase,
                "shards": size,
                "handed out, or missing": int(one["n"]),
                "s": one["s"],
                "shards/s": n / one["s"],
                "driver CPU s": one["cpu_s"],
                "driver MiB": one["mib"],
                "exponent": math.log(one["s"] / before[1]) / math.log(n / before[0]) if before and grown else None,
            }
            before = n, one["s"]


def verdict(results: dict[int, dict[str, dict[str, float]]]) -> str:
    """Compare the largest size with the goals."""
    size, found = max(results.items())
    mib = max(one["mib"] for one in found.values())
    told = [f"{mib:,.0f} MiB (at most {MOST_MIB:,})"]
    if "commit" in found:
        per_s = found["commit"]["n"] / found["commit"]["s"]
        told.insert(0, f"{per_s:,.0f} commits/s through the driver (wanted: {LEAST_PER_S})")
    resumed = [f"{found[phase]['s']:.1f} s" for phase in ("resume", "resume-every-second") if phase in found]
    if resumed:
        told.append(f"planning a resume with half committed {', '.join(resumed)} (at most {MOST_RESUME_S} at 1.35M)")
    return (
        f"At {size:,} shards: {', '.join(told)}. "
        "The exponent is that of time over shards: 1 is linear; below, fixed costs rule."
    )


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["1k", "10k", "100k"], metavar="SHARDS")
    parser.add_argument("--only", nargs="+", default=PHASES, choices=PHASES, metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--points", type=int, default=4, help="hook points of a shard, 136 at most")
    parser.add_argument(
        "--handed", type=int, default=100_000, metavar="SHARDS", help="shards handed to workers at most"
    )
    parser.add_argument("--at", type=Path, help="folder to work in; default: a new one, in memory where that can be")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    if options.measure:
        phase, url = options.measure
        measure(phase, url, size_of(options.sizes[0]), options.points, options.handed)
        return
    memory = Path("/dev/shm")
    place = options.at or (memory if memory.is_dir() else None)
    with harness.Report(options) as report, tempfile.TemporaryDirectory(dir=place) as folder:
        results = {size: Size(size, Path(folder), options).run() for size in sorted(map(size_of, options.sizes))}
        report.table("Shards by the million", rows_of(results), verdict(results))


if __name__ == "__main__":
    main()
