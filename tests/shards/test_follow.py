"""Reading while ingestion goes on: waves in their order, whatever the order and the time of commits."""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from formula_dataset import SMALL, WIDE, Made, flat, rows_of, same_bits

from actlake.shards import follow
from actlake.shards.stream import ActivationStream
from actlake.storage.errors import BadInputError

Make = Callable[..., Made]

#: 9 shards, the last of 100 rows; waves of 2.
N_ROWS = 8 * 256 + 100
OPTIONS: dict[str, Any] = {"points": WIDE, "batch_size": 60, "follow": 2, "buffer_bytes": SMALL, "seed": 3}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("follow", "ahead"):
        monkeypatch.setattr(f"actlake.shards.{module}.POLL_S", 0.02)
    assert follow.POLL_S == 0.02


class Ingestion(threading.Thread):
    """Commits the shards that are missing, in an order of its own and with pauses."""

    def __init__(self, made: Made, seed: int) -> None:
        super().__init__(daemon=True)
        self.made, self.seed, self.committed = made, seed, dict[int, float]()

    def run(self) -> None:
        chance = random.Random(self.seed)
        shards = self.made.open().missing_shards
        chance.shuffle(shards)
        for shard in shards:
            self.made.build(shard)
            self.committed[shard] = time.monotonic()
            time.sleep(chance.random() * 0.06)


def finished(make: Make, **options: Any) -> ActivationStream:
    return Made(f"{make().url}-whole", N_ROWS).build_all().open().stream(**(OPTIONS | options))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_does_not_depend_on_when_shards_are_committed(make: Make, seed: int) -> None:
    wanted = rows_of(list(finished(make)))
    made = make(N_ROWS).build(*[[], [0], [5, 1]][seed])
    stream = made.open().stream(**OPTIONS)
    ingestion = Ingestion(made, seed)
    ingestion.start()
    found = []
    for batch in stream:
        rows = batch.row.numpy()
        # Never a row of a shard that is not committed, and those that are as they are stored.
        assert set((rows // 256).tolist()) <= {*made.open().reader.manifest.shards}
        assert same_bits(batch[WIDE], made.values(WIDE, rows))
        found.append(rows.tolist())
    assert found == wanted
    assert len(set(itertools.chain(*found))) == N_ROWS // 60 * 60
    assert stream.stats()["n_dropped_rows"] == N_ROWS % 60
    assert list(stream) == []


def test_each_wave_is_shuffled_within_itself_and_batches_span_waves(make: Make) -> None:
    stream = finished(make, drop_last=False)
    rows = flat(list(stream))
    for wave in range(5):
        low, high = wave * 512, min((wave + 1) * 512, N_ROWS)
        assert sorted(rows[low:high]) == list(range(low, high))
    assert rows[:512] != sorted(rows[:512])
    with pytest.raises(TypeError, match="a stream that follows ingestion has no length"):
        len(stream)
    # Waves of 8 by default.
    assert finished(make, follow=True).settings.wave_shards == 8


def test_a_wave_is_there_soon_after_its_last_commit(make: Make) -> None:
    made = make(N_ROWS).build(0)
    it = iter(made.open().stream(**OPTIONS))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, it)
        time.sleep(0.3)
        assert not first.done()
        made.build(1)
        assert len(first.result(timeout=10)) == 60
        # The rest of the wave is 7 batches; the next one needs the next wave.
        assert [len(next(it)) for _ in range(7)] == [60] * 7
        more = pool.submit(next, it)
        made.build(3, 2)
        rows = more.result(timeout=10).row.tolist()
    assert {row // 512 for row in rows} == {0, 1}


def test_restored_at_every_step_while_ingestion_goes_on(make: Make) -> None:
    wanted = rows_of(list(finished(make)))
    made = make(N_ROWS)
    ingestion = Ingestion(made, 7)
    ingestion.start()
    stream = made.open().stream(**OPTIONS)
    states = [stream.state_dict(), *(stream.state_dict() for _ in stream)]
    for step in range(0, len(wanted), 4):
        again = made.open().stream(**OPTIONS)
        again.load_state_dict(json.loads(json.dumps(states[step])))
        assert rows_of(list(again)) == wanted[step:]


@pytest.mark.parametrize("n_after", [1, 3])
def test_ranks_follow_together_and_their_states_go_on_on_others(make: Make, n_after: int) -> None:
    whole = rows_of(list(finished(make, drop_last=False)))
    made = make(N_ROWS).build(0, 1, 2, 3, 4)
    before = [made.open().stream(**OPTIONS, rank=rank, world_size=2) for rank in range(2)]
    done = [batch for stream in before for batch in rows_of(list(itertools.islice(stream, 6)))]
    states = [stream.state_dict() for stream in before]
    ingestion = Ingestion(made, 5)
    ingestion.start()
    after = [made.open().stream(**OPTIONS, rank=rank, world_size=n_after) for rank in range(n_after)]
    for stream in after:
        stream.load_state_dict(states)
    later = [rows_of(list(stream)) for stream in after]
    assert len({len(batches) for batches in later}) == 1
    together = sorted([*done, *itertools.chain(*later)])
    missing = [batch for batch in whole if batch not in together]
    assert sorted(together + missing) == sorted(whole)
    assert len(missing) <= n_after
    assert {stream.stats()["n_dropped_rows"] for stream in after} == {sum(map(len, missing))}


def test_scales_do_not_depend_on_when_shards_are_committed(make: Make) -> None:
    def scaled(stream: ActivationStream) -> Iterator[torch.Tensor]:
        return (batch[WIDE] for batch in stream)

    wanted = list(scaled(finished(make, normalize="unit")))
    for n_before in (0, 1, 6):
        made = Made(f"{make().url}-{n_before}", N_ROWS).build(*range(n_before))
        stream = made.open().stream(**OPTIONS, normalize="unit")
        ingestion = Ingestion(made, n_before)
        ingestion.start()
        assert all(torch.equal(*pair) for pair in zip(scaled(stream), wanted, strict=True))


def test_a_short_last_shard_is_waited_for_until_it_has_grown(make: Make) -> None:
    wanted = rows_of(list(finished(make)))
    made = Made(make(N_ROWS - 40).build_all().url, N_ROWS)
    stream = made.open().stream(**OPTIONS)
    found = rows_of(list(itertools.islice(stream, 30)))
    ingestion = Ingestion(made, 0)
    ingestion.start()
    assert found + rows_of(list(stream)) == wanted
    assert list(ingestion.committed) == [8]


def test_voids_and_filters_are_those_of_the_records_as_they_come(make: Make) -> None:
    voids = frozenset({3, 700, *range(512, 600), *range(1024, 1536)})
    made = make(N_ROWS, voids=voids).build(0)
    stream = made.open().where(position=(50, None)).stream(**(OPTIONS | {"drop_last": False}))
    ingestion = Ingestion(made, 1)
    ingestion.start()
    wanted = [row for row in range(N_ROWS) if row not in voids and row % 97 >= 50]
    # The third wave is void as a whole.
    assert sorted(flat(list(stream))) == wanted


@pytest.mark.parametrize("options", [{"epochs": 2}, {"epochs": None}, {"rows": 500}, {"order": "sequence"}])
def test_what_cannot_be_followed_is_refused(make: Make, options: dict[str, Any]) -> None:
    with pytest.raises(BadInputError, match="follow=True reads each row once, in waves"):
        make(N_ROWS).open().stream(**(OPTIONS | options))
