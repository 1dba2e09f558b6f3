"""The commit protocol as a state machine: whoever writes, dies, repeats or comes late, readers see what is committed.

Attempts differ in every byte, as on devices that round differently, so that a mixture of two can be seen. Drivers
summarise what they saw earlier, and are interrupted between any two of their changes.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from formula_dataset import bits, make_spec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

import actlake
from actlake.shards.dataset import ActivationDataset
from actlake.shards.verify import repair, verify
from actlake.storage.arrays import ShardObject, crc32c, encode_shard
from actlake.storage.errors import DataError, NotFoundError
from actlake.storage.finish import finish
from actlake.storage.header import Header, prepare
from actlake.storage.manifest import Manifest, compact, uncommit, write_root
from actlake.storage.moments import of_shard, to_parquet
from actlake.storage.records import ObjectRecord, Provenance, ShardRecord, commit, commit_key, read_record, stats_key
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store
from actlake.storage.summaries import drop_stale_groups

SPEC = make_spec(
    hook_points=(
        PointSpec(name="layers.0.resid_post", width=16, rows_per_chunk=16),
        PointSpec(name="layers.3.mlp_out", width=24, rows_per_chunk=16),
    ),
    rows_per_shard=32,
    rows_per_block=32,
)
ARRAYS, DATASET_ID = SPEC.arrays(), SPEC.dataset_id
#: Attempts of one example: each has 8 more numbers of noise than the one before, and so is longer when compressed.
MOST_ATTEMPTS = 14
#: Rows that are planned at first, after each growth, and at most: the last shard is whole, short, and longer again.
FIRST_ROWS, MORE_ROWS, MOST_ROWS = 64, 24, 136

number = st.integers(0, 11)
events = st.sampled_from(["die", "uncommit", "commit", "summarise"])


def values(name: str, shard: int, n_rows: int, attempt: int) -> npt.NDArray[Any]:
    """What an attempt stores for a shard: of row columns the same as every other."""
    array = ARRAYS[name]
    if array.width is None:
        rows = np.arange(32 * shard, 32 * shard + n_rows)
        return (rows * 7 % 89 if name != "rows/role" else rows * 0).astype(array.numpy_dtype)
    noise = np.random.default_rng([attempt, array.width]).standard_normal((n_rows, array.width))
    noise.reshape(-1)[8 * (attempt + 1) :] = attempt
    return noise.astype(array.numpy_dtype)


@cache
def encoded(name: str, shard: int, n_rows: int, attempt: int) -> ShardObject:
    return encode_shard(ARRAYS[name], values(name, shard, n_rows, attempt))


@cache
def statistics(shard: int, n_rows: int, attempt: int) -> bytes:
    rows = np.arange(32 * shard, 32 * shard + n_rows)
    return to_parquet({p: of_shard(values(p, shard, n_rows, attempt), numbers=rows) for p in SPEC.point_names})


@dataclass(kw_only=True)
class Attempt:
    """One try at a shard: ``replaces`` is the record that it found, of fewer rows; ``left`` is still to be stored."""

    number: int
    shard: int
    n_rows: int
    replaces: ShardRecord | None
    left: set[str] = field(default_factory=lambda: {"stats", *ARRAYS})
    begun: bool = False
    committed: bool = False

    def key(self, name: str) -> str:
        return stats_key(self.shard) if name == "stats" else ARRAYS[name].object_key(self.shard)

    def content(self, name: str) -> bytes:
        if name == "stats":
            return statistics(self.shard, self.n_rows, self.number)
        return b"".join(encoded(name, self.shard, self.n_rows, self.number).parts)

    @property
    def record(self) -> ShardRecord:
        objects = {name: encoded(name, self.shard, self.n_rows, self.number) for name in ARRAYS}
        stats = self.content("stats")
        return ShardRecord(
            dataset_id=DATASET_ID,
            shard=self.shard,
            revision=0 if self.replaces is None else self.replaces.revision + 1,
            first_row=32 * self.shard,
            n_rows=self.n_rows,
            n_void=0,
            objects={
                name: ObjectRecord(nbytes=one.nbytes, crc32c=one.crc32c, index_crc32c=one.index_crc32c)
                for name, one in objects.items()
            },
            stats=ObjectRecord(nbytes=len(stats), crc32c=crc32c(stats)),
            provenance=Provenance(attempt=str(self.number)),
        )


class Killed(Exception):
    """A driver was killed."""


class Interrupted(Store):
    """A store whose change number ``at`` (writes and deletes, from 0) is preceded by ``event``."""

    def __init__(self, url: str, at: int, event: Callable[[], None]) -> None:
        super().__init__(url)
        self._left, self._event = at, event

    def _step(self) -> None:
        self._left -= 1
        if self._left == -1:
            self._event()

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        self._step()
        super().write(key, *parts)

    def delete(self, key: str) -> None:
        self._step()
        super().delete(key)


class CommitProtocol(RuleBasedStateMachine):
    """Two drivers, any number of attempts and readers, and what must be seen of them."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store("memory://commit-protocol/ds")
        self.store.fs.store.clear()
        self.n_rows = FIRST_ROWS
        prepare(self.store, self.header)
        self.attempts: list[Attempt] = []
        #: Who wrote what is there: by key; who is committed: by shard; ever: by shard.
        self.writers: dict[str, Attempt] = {}
        self.committed: dict[int, Attempt] = {}
        self.seen: dict[int, tuple[Header, Manifest]] = {}
        self.readers: list[tuple[ActivationDataset, dict[int, Attempt]]] = []

    @property
    def header(self) -> Header:
        return Header(spec=SPEC, n_rows=self.n_rows, corpus="../corpus")

    # --- attempts ---

    @property
    def unfinished(self) -> list[Attempt]:
        return [attempt for attempt in self.attempts if not attempt.committed]

    @initialize()
    def build_the_first_group(self) -> None:
        """What follows happens to shards that are there; others come with growth."""
        for shard in (0, 1):
            self.build(shard)

    @precondition(lambda self: len(self.attempts) < MOST_ATTEMPTS)
    @rule(shard=number)
    def build(self, shard: int) -> None:
        """An attempt that nothing disturbs."""
        n_before = len(self.attempts)
        self.start(shard)
        if len(self.attempts) > n_before:
            self.write_the_rest_and_commit(-1)

    @precondition(lambda self: len(self.attempts) < MOST_ATTEMPTS)
    @rule(shard=number)
    def start(self, shard: int) -> None:
        """A worker looks for a commit, and else begins; an earlier attempt at the shard may be alive."""
        space = SPEC.row_space(self.n_rows)
        shard %= space.n_shards
        try:
            found = read_record(self.store, shard)
        except NotFoundError:
            found = None
        n_rows = len(space.rows_of(shard))
        if found is None or found.n_rows < n_rows:
            self.attempts.append(Attempt(number=len(self.attempts), shard=shard, n_rows=n_rows, replaces=found))

    @precondition(lambda self: self.unfinished)
    @rule(which=number, names=st.sets(st.sampled_from(["stats", *ARRAYS])))
    def write(self, which: int, names: set[str]) -> None:
        """An attempt stores more of its objects; any of them, as uploads run side by side."""
        attempt = self.unfinished[which % len(self.unfinished)]
        for name in sorted(attempt.left & names):
            self._store(attempt, name)

    @precondition(lambda self: self.unfinished)
    @rule(which=number)
    def write_the_rest_and_commit(self, which: int) -> None:
        self._complete(self.unfinished[which % len(self.unfinished)])
        self.check()

    @precondition(lambda self: any(attempt.begun for attempt in self.attempts))
    @rule(which=number, name=st.sampled_from(["stats", *ARRAYS, "commit"]))
    def repeat_a_request(self, which: int, name: str) -> None:
        """A request of an attempt, which may be over, arrives again, or only now."""
        begun = [attempt for attempt in self.attempts if attempt.begun]
        attempt = begun[which % len(begun)]
        if name == "commit" and attempt.committed:
            self._commit(attempt)
            self.check()
        elif name not in ("commit", *attempt.left):
            self._store(attempt, name)

    @precondition(lambda self: len(self.attempts) + 2 <= MOST_ATTEMPTS)
    @rule(shard=number, late=st.sets(st.sampled_from(["stats", *ARRAYS]), min_size=1), commits=st.booleans())
    def overtake(self, shard: int, late: set[str], commits: bool) -> None:
        """Of two attempts at a shard, the one that began first stores some objects last, and may commit in the end."""
        shard %= SPEC.row_space(self.n_rows).n_shards
        if shard in self.committed:
            self._uncommit(shard)
        self.start(shard)
        self.start(shard)
        first, second = self.attempts[-2:]
        self._complete(second)
        for name in sorted(late):
            self._store(first, name)
        if commits:
            self._complete(first)
        self.check()

    def _complete(self, attempt: Attempt) -> None:
        for name in sorted(attempt.left):
            self._store(attempt, name)
        self._commit(attempt)

    def _store(self, attempt: Attempt, name: str) -> None:
        if not attempt.begun and attempt.replaces is not None:
            self._uncommit(attempt.shard)
        attempt.begun = True
        self.store.write(attempt.key(name), attempt.content(name))
        self.writers[attempt.key(name)] = attempt
        attempt.left.discard(name)

    def _commit(self, attempt: Attempt) -> None:
        attempt.committed = True
        commit(self.store, attempt.record)
        self.committed[attempt.shard] = attempt

    # --- drivers ---

    @rule(shard=number, at=st.integers(0, 6), event=events, which=number)
    def uncommit(self, shard: int, at: int, event: str, which: int) -> None:
        """A damaged shard is un-committed; meanwhile something else happens, or this process dies."""
        if self.committed:
            shard = sorted(self.committed)[shard % len(self.committed)]
            with suppress(Killed):
                uncommit(self._interrupted(at, event, which), shard)
            # It may have been killed before it came so far, and another attempt may have committed since.
            if not self.store.exists(commit_key(shard)):
                self.committed.pop(shard, None)
        self.check()

    def _uncommit(self, shard: int) -> None:
        uncommit(self.store, shard)
        self.committed.pop(shard, None)

    @rule(driver=st.integers(0, 1))
    def look(self, driver: int) -> None:
        header = Header.read(self.store)
        self.seen[driver] = header, Manifest.load(self.store, header.n_rows)

    @precondition(lambda self: self.seen)
    @rule(driver=number, at=st.integers(0, 6), event=events, which=number)
    def summarise(self, driver: int, at: int, event: str, which: int) -> None:
        """A driver writes what summarises the commits that it saw, whatever happened since, or happens meanwhile."""
        try:
            self._summarise(self._interrupted(at, event, which), driver)
        except Killed:
            # What the next run begins with.
            drop_stale_groups(self.store)
        self.check()

    def _summarise(self, store: Store, driver: int) -> None:
        header, seen = list(self.seen.values())[driver % len(self.seen)]
        space = SPEC.row_space(header.n_rows)
        sizes = {shard: len(space.rows_of(shard)) for shard in range(space.n_shards)}
        try:
            groups = compact(store, seen, space)
            if seen.n_rows_by_shard() == sizes:
                write_root(store, dataset_id=DATASET_ID, n_rows=header.n_rows, manifest=seen, groups=groups)
        except DataError:
            return  # What it saw is no longer there.

    @rule()
    def finish(self) -> None:
        finish(self.store, Header.read(self.store))
        self.check()

    @precondition(lambda self: self.n_rows < MOST_ROWS)
    @rule()
    def grow(self) -> None:
        self.n_rows += MORE_ROWS
        prepare(self.store, self.header)
        self.check()

    def _interrupted(self, at: int, event: str, which: int) -> Interrupted:
        """Return the store as a driver has it, to which at its change ``at`` something happens."""

        def die() -> None:
            raise Killed

        def uncommit_one() -> None:
            if self.committed:
                self._uncommit(sorted(self.committed)[which % len(self.committed)])

        def commit_one() -> None:
            if self.unfinished:
                self._complete(self.unfinished[which % len(self.unfinished)])

        def summarise_one() -> None:
            if self.seen:
                self._summarise(self.store, which)

        happens = {"die": die, "uncommit": uncommit_one, "commit": commit_one, "summarise": summarise_one}
        return Interrupted(self.store.url, at, happens[event])

    # --- readers ---

    @rule()
    def open(self) -> None:
        self.readers = [*self.readers[-2:], (actlake.open(self.store.url), dict(self.committed))]

    @precondition(lambda self: self.readers)
    @rule(which=number, shard=number)
    def read(self, which: int, shard: int) -> None:
        """A reader gives what the record says, the one that it opened with or the present one; or it raises."""
        ds, known = self.readers[which % len(self.readers)]
        shard %= SPEC.row_space(self.n_rows).n_shards
        for name in ARRAYS:
            found = self._rows(ds, name, shard)
            may_be = [one for one in (known.get(shard), self.committed.get(shard)) if one is not None]
            wanted = [bits(values(name, shard, one.n_rows, one.number)).tobytes() for one in may_be]
            assert found is None or found in wanted

    @staticmethod
    def _rows(ds: ActivationDataset, name: str, shard: int) -> bytes | None:
        array = ARRAYS[name]
        try:
            n_rows = ds.reader.record(shard).n_rows
            out = np.empty(array.shape(32), dtype=array.numpy_dtype)
            ds.reader.read_rows(array, shard, 0, n_rows, out)
        except DataError:
            return None
        return bits(out[:n_rows]).tobytes()

    # --- what must hold ---

    def check(self) -> None:
        """Readers see exactly the committed shards."""
        found = Manifest.load(self.store, self.n_rows)
        assert found.shards == sorted(self.committed)
        assert found.numbers("n_rows").tolist() == [one.n_rows for _, one in sorted(self.committed.items())]
        for shard, one in self.committed.items():
            assert found.record(shard).provenance.attempt == str(one.number)

    def teardown(self) -> None:
        """Every mixture is found and nothing else is; what is repaired and built again is whole."""
        ds = actlake.open(self.store.url)
        report = verify(ds, n_threads=1)
        for shard, one in self.committed.items():
            for name in ARRAYS:
                wanted = bits(values(name, shard, one.n_rows, one.number)).tobytes()
                assert self._rows(ds, name, shard) == (None if self._is_mixed(one, name) else wanted)
        mixed = {shard for shard, one in self.committed.items() if self._is_mixed(one, "stats", *ARRAYS)}
        assert {p.shard for p in report.problems if p.shard is not None} == mixed, report.problems
        repair(ds, report)
        for shard in mixed:
            self.committed.pop(shard)
        self.check()
        for shard in range(SPEC.row_space(self.n_rows).n_shards):
            self.build(shard)
        finish(self.store, Header.read(self.store))
        whole = actlake.open(self.store.url)
        assert whole.complete
        assert verify(whole, n_threads=1).problems == ()
        self.check()

    def _is_mixed(self, one: Attempt, *names: str) -> bool:
        """Whether any of these objects, as it is there, has other bytes than the committed attempt's."""
        return any(self.writers[one.key(name)].content(name) != one.content(name) for name in names)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two shards, indexes of two groups: what takes a thousand commits happens with a few."""
    for name in ("GROUP_SHARDS", "INDEX_GROUPS"):
        for module in [module for key, module in sys.modules.items() if key.startswith("actlake.")]:
            if name in vars(module):
                monkeypatch.setattr(module, name, 2)


@pytest.mark.usefixtures("small_groups")
def test_readers_see_exactly_what_is_committed_whatever_happens() -> None:
    run_state_machine_as_test(
        CommitProtocol, settings=settings(max_examples=50, stateful_step_count=25, derandomize=True, deadline=None)
    )
