"""Ingestion runs that are disturbed, and what is left of them: what the tests of this folder and run.py share."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiny_gemma
from chaos.site import planted
from runs import contents

import actlake
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import verify
from actlake.storage.corpus import Corpus
from actlake.storage.errors import CorruptObjectError, NotFoundError
from actlake.storage.stores import resolve_url

SITE = Path(planted.__file__).parent
MARK = "ACTLAKE_CHAOS"

#: Seconds that a run may take that is never disturbed again, and one until it comes to an armed point.
_RUN_S, _POINT_S = 300.0, 240.0

#: Imported once for all runs of the local engine, which are forks of the process that did it: 8 s of a core a run less.
_PRELOADED = (
    "pandas",
    "pyarrow.dataset",
    "torch",
    "transformers.models.gemma3.modeling_gemma3",
    "actlake.ingest.build",
    "actlake.ingest.loading",
    "actlake.jobs.engines.local",
    "actlake.jobs.ingestion",
    *(f"actlake.jobs.cli.{name}" for name in ("corpus", "demo", "ingest", "listener", "plan", "query", "report")),
    *(f"actlake.jobs.cli.{name}" for name in ("sql", "stats", "store", "verify")),
)


# --- processes ----------------------------------------------------------------------------------------------------


class Driver(Protocol):
    """A process of ``actlake ingest``."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""

    def wait(self, timeout: float) -> int:
        """Return its exit code; raise ``TimeoutError`` where it does not end."""


class Fresh:
    """An interpreter of its own."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path, *prefix: str) -> None:
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "actlake.jobs.cli", *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"process {self.pid} does not end") from error


class Forked:
    """A fork of a process that has imported everything: the same command in a tenth of the time."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        self._process = context.Process(target=_command, args=(list(arguments), dict(environment), log))
        self._process.start()
        self.pid: int = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} does not end")
        return self._process.exitcode


def _command(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    from actlake.jobs.cli import main

    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    # For the processes that this one starts.
    sys.path.insert(0, str(SITE))
    planted.plant(Path(environment[MARK]))
    sys.argv = ["actlake", *arguments]
    main()


def kill(pid: int) -> None:
    """End a process at once, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    """Return the process that started another. Linux."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def marked(folder: Path) -> dict[int, str]:
    """Return the processes that were started with a run's folder in their environment, and their command lines."""
    found, mark = {}, f"{MARK}={folder}".encode()
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(entry)] = command
    return found


def wait_until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return what ``holds`` gives as soon as it is true; raise ``TimeoutError`` naming ``what``."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.005)
    return found


# --- the job ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class World:
    """A model and texts, and what an undisturbed run makes of them, in how many seconds."""

    folder: Path
    model: Path
    texts: Path
    contents: dict[str, Any]
    seconds: float

    @classmethod
    def make(cls, folder: Path) -> "World":
        """Write the model and the texts, and run the job once."""
        texts = folder / "texts"
        texts.mkdir(parents=True)
        random = np.random.default_rng(0)
        for number in range(60):
            words = random.integers(4, tiny_gemma.VOCABULARY, size=random.integers(1, 60))
            (texts / f"{number:04d}.txt").write_text(" ".join(f"w{word}" for word in words))
        bare = cls(folder=folder, model=tiny_gemma.save(folder / "tiny"), texts=texts, contents={}, seconds=0.0)
        # The first run of all waits for the imports.
        Run(bare, folder / "warm").build()
        started = time.monotonic()
        run = Run(bare, folder / "undisturbed").build()
        seconds = time.monotonic() - started
        return cls(folder=folder, model=bare.model, texts=texts, contents=contents(run.dataset), seconds=seconds)


@dataclass(kw_only=True)
class Outcome:
    """What is left of a run in the end; ``bytes_differing`` None where bits differ from attempt to attempt."""

    kills: int = 0
    resumes: int = 0
    rows_lost: int = 0
    rows_twice: int = 0
    bytes_differing: int | None = 0
    mixtures_made: int = 0
    mixtures_found: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether every row is there once with the bytes of an undisturbed run, and nothing else is."""
        counts = (self.rows_lost, self.rows_twice, self.bytes_differing or 0, self.mixtures_made, self.mixtures_found)
        return not any(counts) and not self.problems

    @property
    def is_sound(self) -> bool:
        """Whether it is whole, or, where bits differ, holds mixtures of two attempts that were all found."""
        seen = replace(self, mixtures_made=0, mixtures_found=0) if self.bytes_differing is None else self
        return seen.is_whole and self.mixtures_made == self.mixtures_found


class Run:
    """One dataset on its way through faults; ``points`` is the folder by which its processes are stopped."""

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        engine: str = "local",
        workers: int | str = 1,
        address: str | None = None,
        points: Path | None = None,
        codec: str = "blosc",
        salted: bool = False,
        dataset: str | None = None,
        options: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.world, self.folder, self.engine, self.workers, self.address = world, folder, engine, workers, address
        self.dataset, self.points = folder / "ds", points or folder / "points"
        self.salted, self.n_kills, self.n_resumes = salted, 0, 0
        self._environment = {MARK: str(self.points), "PYTHONPATH": str(SITE), **(environment or {})}
        for place in (folder, self.points):
            place.mkdir(parents=True, exist_ok=True)
        if salted:
            (self.points / "salt").touch()
        self.job = folder / "job.toml"
        self.job.write_text(self._job_text(dataset or str(self.dataset), codec, options or {}))

    def _job_text(self, dataset: str, codec: str, options: Mapping[str, Any]) -> str:
        return (
            f'dataset = "{dataset}"\nmodel = "{self.world.model}"\n'
            'hook_points = ["layers.*.resid_post", "layers.1.attn_z"]\nmax_rows = 700\n'
            f'[capture]\nbatch_tokens = 256\n[corpus]\nsources = ["{self.world.texts}/*.txt"]\ncontext_length = 32\n'
            f'holdout = 0.2\n[layout]\nrows_per_shard = 128\nrows_per_chunk = 32\ncodec = "{codec}"\n'
            f"[run]\nthreads = 1\nattempts = 4\nworkers = {self.workers}\n" + toml_table("storage_options", options)
        )

    @property
    def log(self) -> Path:
        """What the drivers have said."""
        return self.folder / "log"

    # --- driving ---

    def start(self, *prefix: str) -> Driver:
        """Start a driver; ``prefix`` goes before the command."""
        arguments = ["ingest", str(self.job), "--engine", self.engine]
        arguments += ["--address", self.address] if self.address else []
        if self.engine == "local" and not prefix:
            return Forked(arguments, self._environment, self.log)
        return Fresh(arguments, self._environment, self.log, *prefix)

    def build(self) -> "Run":
        """Run to the end, which has to be a good one."""
        return self.finish(self.start())

    def finish(self, driver: Driver) -> "Run":
        """Wait for the end of a driver, which has to be a good one."""
        code = driver.wait(_RUN_S)
        assert code == 0, f"exit code {code}:\n{self.log.read_text()[-3000:]}"
        return self

    def resume(self) -> "Run":
        """Run again."""
        self.n_resumes += 1
        return self.build()

    # --- points ---

    def arm(self, point: str) -> None:
        """Let the next process that comes to a point wait there."""
        for left in self.points.glob(f"{point}.*"):
            left.unlink()
        (self.points / f"{point}.armed").touch()

    def reached(self, point: str, driver: Driver) -> int:
        """Wait until a process is at a point; return it."""

        def there() -> int:
            assert driver.poll() is None, f"the run ended before {point}:\n{self.log.read_text()[-3000:]}"
            found = [path.suffix[1:] for path in self.points.glob(f"{point}.*")]
            return next((int(suffix) for suffix in found if suffix.isdigit()), 0)

        pid: int = wait_until(there, _POINT_S, f"a process at {point}")
        return pid

    def go(self, point: str) -> None:
        """Let the process at a point go on."""
        (self.points / f"{point}.go").touch()

    def kill(self, *pids: int) -> None:
        """SIGKILL."""
        self.n_kills += 1
        for pid in pids:
            kill(pid)

    # --- what is left ---

    def splits(self) -> Iterator[ActivationDataset]:
        """Yield both splits, as they are now."""
        ds = actlake.open(self.dataset)
        yield ds
        with suppress(NotFoundError):
            yield ds.heldout

    def check_committed(self) -> None:
        """Whatever is committed now has the bytes of an undisturbed run."""
        with suppress(NotFoundError):
            for ds in self.splits():
                assert verify(ds, n_threads=1).problems == ()
        here = {} if self.salted else contents(self.dataset)
        for key in (key for key in here if "commits/" in key):
            assert here[key] == self.world.contents[key]

    def outcome(self) -> Outcome:
        """Count what is wrong with the finished dataset."""
        found = Outcome(kills=self.n_kills, resumes=self.n_resumes)
        mixed_by_readers, mixed_by_verify = set[tuple[str, int]](), set[tuple[str, int]]()
        for ds in self.splits():
            corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
            report = verify(ds, corpus=corpus, n_threads=1)
            split = ds.spec.split
            mixed_by_verify |= {(split, shard) for shard in report.bad_shards}
            mixed_by_readers |= {(split, shard) for shard in read_mixed(ds)}
            found.problems += [problem.message for problem in report.problems if problem.shard is None]
            if not mixed_by_verify | mixed_by_readers:
                lost, twice = lost_and_twice(ds, corpus)
                found.rows_lost, found.rows_twice = found.rows_lost + lost, found.rows_twice + twice
        made = self.mixtures()
        found.mixtures_made, found.mixtures_found = len(made), len(mixed_by_verify | mixed_by_readers)
        if made != mixed_by_verify | mixed_by_readers:
            found.problems.append(f"mixtures made {sorted(made)}, found {sorted(mixed_by_verify | mixed_by_readers)}")
        if not mixed_by_readers <= mixed_by_verify:
            found.problems.append(f"readers found {sorted(mixed_by_readers)}, verify {sorted(mixed_by_verify)}")
        found.bytes_differing = None if self.salted else self._bytes_differing()
        return found

    def _bytes_differing(self) -> int:
        here, wanted = contents(self.dataset), self.world.contents
        keys = {key for key in here.keys() | wanted.keys() if here.get(key) != wanted.get(key)}
        places = [self.dataset / key for key in keys] + [self.world.folder / "undisturbed/ds" / key for key in keys]
        return sum(path.stat().st_size for path in places if path.exists())

    def mixtures(self) -> set[tuple[str, int]]:
        """Return the shards of which an object is another process's than the record: by what processes noted."""
        # Noted before they are written, so that no kill comes between; of each object there is what its bytes say.
        notes = [json.loads(line) for line in (self.points / "writes").read_text().splitlines()]
        written = {(Path(note["url"], note["key"]), note["pid"], note["sha256"]) for note in notes}
        found = set()
        for record in self.dataset.rglob("commits/*/*.json"):
            pids = {pid for path, pid, sha256 in written if (path, sha256) == (record, digest(record))}
            place, shard = record.parents[2], int(record.stem)
            objects = [place / f"stats/{shard:010d}.parquet", *place.glob(f"arrays/layers.*/c/{shard}/0")]
            if not all(any((one, pid, digest(one)) in written for pid in pids) for one in objects):
                found.add(("heldout" if place.name == "heldout" else "train", shard))
        return found


def lost_and_twice(ds: ActivationDataset, corpus: Corpus) -> tuple[int, int]:
    """Return how many of the planned rows are not stored, and how many are stored again: by sequence and position."""
    stored = np.stack([ds[f"rows/{column}"][:] for column in ("sequence", "position")], axis=1)
    distinct = np.unique(stored, axis=0)
    index = corpus.row_index(ds.spec.split, ds.spec.keep)
    n_planned = min(index.n_rows, ds.n_rows_planned)
    return n_planned - len(distinct), len(stored) - len(distinct)


def read_mixed(ds: ActivationDataset) -> Iterator[int]:
    """Yield the shards of which a reader says that they are of two attempts."""
    space = ds.spec.row_space(ds.n_rows_planned)
    for shard in range(space.n_shards):
        rows = space.rows_of(shard)
        try:
            for point in ds.hook_points:
                ds[point][rows.start : rows.stop]
            ds.reader.statistics(shard)
        except CorruptObjectError:
            yield shard


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toml_table(name: str, table: Mapping[str, Any]) -> str:
    """Return a table of strings, numbers and tables as TOML."""
    scalars = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    text = f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in scalars.items()) if table else ""
    inner = [toml_table(f"{name}.{key}", value) for key, value in table.items() if isinstance(value, Mapping)]
    return text + "".join(inner)
