"""Each adapter gives a stream's rows in the form that its trainer reads, and keeps its place, length and memory."""

import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FormulaModel, formula, make_corpus, make_spec, write_documents
from formula_dataset import NARROW, SMALL, WIDE
from torch import Tensor
from torch.utils.data import DataLoader

import actlake
from actlake.ingest.build import ShardBuilder
from actlake.shards.adapters import Adapter, CltStack, Dicts, Layers, OpenMoss, Pairs, Stack, Tensors
from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.shards.normalizer import Normalizer
from actlake.shards.sequences import Sequences
from actlake.shards.stream import ActivationStream
from actlake.storage.errors import BadInputError
from actlake.storage.header import Header, prepare
from actlake.storage.moments import Moments
from actlake.storage.stores import Store

IN, OUT = [f"layers.{layer}.mlp_in" for layer in (2, 10, 9)], [f"layers.{layer}.mlp_out" for layer in (9, 2, 10)]
LENGTHS = [3, 7, 1, 4, 9, 2, 5]
N_ROWS = sum(LENGTHS)


@dataclass(frozen=True)
class Rows:
    """A batch: what an adapter reads of one."""

    activations: Mapping[str, Tensor]
    row: Tensor
    sequence: Tensor

    @property
    def token_id(self) -> Tensor:
        return (self.row * 7 + 3).int()

    @property
    def position(self) -> Tensor:
        return (self.row * 2 + 1).int()

    def __len__(self) -> int:
        return len(self.row)


def settings(**changes: Any) -> SimpleNamespace:
    usual = {"batch_size": 5, "order": "sequence", "drop_last": False, "normalize": None}
    return SimpleNamespace(**(usual | changes))


@dataclass
class FakeStream:
    """Rows 0..30 in order, in batches: what an adapter reads of a stream, and no more."""

    inputs: tuple[str, ...]
    targets: tuple[str, ...] = ()
    width: int = 4
    odd: str | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    settings: Any = field(default_factory=lambda: settings())
    at: int = 0
    turn: int = 0

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.inputs, *self.targets)))

    @property
    def widths(self) -> dict[str, int]:
        return {name: self.width + (name == self.odd) for name in self.hook_points}

    def values(self, name: str, rows: Tensor) -> Tensor:
        place = self.hook_points.index(name)
        return rows[:, None] * 100.0 + place * 10 + torch.arange(self.widths[name])

    def __len__(self) -> int:
        return -(-N_ROWS // int(self.settings.batch_size))

    def __iter__(self) -> Iterator[TokenBatch]:
        self.turn += 1
        return self.run(self.turn)

    def run(self, turn: int) -> Iterator[TokenBatch]:
        self.at %= N_ROWS
        while self.at < N_ROWS:
            assert turn == self.turn, "an iterator that was replaced"
            rows = torch.arange(self.at, min(self.at + self.settings.batch_size, N_ROWS))
            sequence = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))[rows] + 40
            activations = {name: self.values(name, rows) for name in self.hook_points}
            self.at = int(rows[-1]) + 1
            batch: Any = Rows(activations=activations, row=rows, sequence=sequence)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    @property
    def normalizer(self) -> Normalizer | None:
        if self.settings.normalize is None:
            return None
        return Normalizer.of(self.moments, self.settings.normalize, self.inputs, self.targets)

    def load_state_dict(self, state: Any, /) -> None:
        self.at, self.turn = state["at"], self.turn + 1


def sides(**options: Any) -> FakeStream:
    return FakeStream(tuple(IN), tuple(OUT), **options)


def plain(n: int = 1, **options: Any) -> FakeStream:
    return FakeStream(tuple(IN[:n]), **options)


FIRST = torch.arange(5)
ADAPTERS: dict[str, Callable[[], Adapter[Any]]] = {
    "tensors": lambda: Tensors(plain()),
    "dicts": lambda: Dicts(sides()),
    "pairs": lambda: Pairs(FakeStream((IN[0],), (OUT[0],))),
    "stack": lambda: Stack(plain(3)),
    "layers": lambda: Layers(sides()),
    "clt_stack": lambda: CltStack(sides()),
    "openmoss": lambda: OpenMoss(plain(3)),
    "sequences": lambda: Sequences(plain(2), n_sequences=2),
}
every_adapter = pytest.mark.parametrize("name", ADAPTERS)


def leaves(value: Any) -> list[Tensor]:
    """Return all tensors of a batch of any form."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return list(itertools.chain.from_iterable(map(leaves, parts)))


def equal(a: Any, b: Any) -> bool:
    return len(leaves(a)) == len(leaves(b)) and all(map(torch.equal, leaves(a), leaves(b)))


# --- what a batch is ---


def test_tensors_are_the_batches_of_the_one_hook_point() -> None:
    stream = plain()
    batches = list(Tensors(stream))
    assert torch.equal(torch.cat(batches), stream.values(IN[0], torch.arange(N_ROWS)))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 5, 5, 1]


def test_dicts_have_every_hook_point() -> None:
    stream = sides()
    batch = next(Dicts(stream))
    assert list(batch) == IN + OUT
    assert all(torch.equal(rows, stream.values(name, FIRST)) for name, rows in batch.items())


def test_a_stack_is_in_the_order_of_the_hook_points() -> None:
    stream = plain(3)
    batch = next(Stack(stream))
    assert batch.shape == (5, 3, 4)
    assert all(torch.equal(batch[:, place], stream.values(name, FIRST)) for place, name in enumerate(IN))


def test_a_pair_is_an_input_and_a_target() -> None:
    stream = FakeStream((IN[0],), (OUT[0],))
    batch = next(Pairs(stream))
    assert batch.shape == (5, 2, 4)
    assert torch.equal(batch[:, 0], stream.values(IN[0], FIRST))
    assert torch.equal(batch[:, 1], stream.values(OUT[0], FIRST))
    assert torch.equal(next(Pairs(plain(2))), next(Stack(plain(2))))


def test_layers_are_keyed_by_number_on_either_side() -> None:
    stream = sides()
    adapter = Layers(stream)
    inputs, targets = next(adapter)
    assert (list(inputs), list(targets), adapter.layer_indices) == ([2, 9, 10], [2, 9, 10], [2, 9, 10])
    for layer in (2, 9, 10):
        assert torch.equal(inputs[layer], stream.values(f"layers.{layer}.mlp_in", FIRST))
        assert torch.equal(targets[layer], stream.values(f"layers.{layer}.mlp_out", FIRST))


def test_layers_can_be_counted_from_zero() -> None:
    stream = FakeStream((IN[1], IN[0]), (OUT[2],))
    adapter = Layers(stream, renumber=True)
    inputs, targets = adapter.get_batch()
    assert (list(inputs), list(targets), adapter.layer_indices) == ([0, 1], [1], [0, 1])
    assert torch.equal(inputs[1], stream.values("layers.10.mlp_in", FIRST))
    assert torch.equal(targets[1], stream.values("layers.10.mlp_out", FIRST))


def test_layers_of_aligned_datasets_keep_their_numbers() -> None:
    stream = FakeStream(("base:layers.9.resid_post",), ("chat:layers.9.resid_post",))
    assert [list(side) for side in next(Layers(stream))] == [[9], [9]]


def test_layers_have_what_crosslayer_coding_reads() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 4)) * [1, 2, 3, 4] + 5
    moments = {name: Moments.of(rows + place) for place, name in enumerate(IN + OUT)}
    adapter = Layers(sides(moments=moments, settings=settings(normalize="standardize")))
    assert (adapter.d_model, adapter.num_layers, adapter.train_batch_size_tokens) == (4, 3, 5)
    assert (adapter.dtype, adapter.device, adapter.total_tokens) == (torch.float32, torch.device("cpu"), 35)
    assert adapter.apply_normalization
    # OUT is of layers 9, 2 and 10: 3, 4 and 5 places behind the first hook point.
    for layer, place in ((9, 3), (2, 4), (10, 5)):
        np.testing.assert_allclose(adapter.mean_tg[layer], rows.mean(0) + place, rtol=1e-6)
        np.testing.assert_allclose(adapter.std_tg[layer], rows.std(0), rtol=1e-6)
    scaled = Layers(sides(moments=moments, settings=settings(normalize="unit")))
    assert (scaled.mean_tg, scaled.std_tg, scaled.apply_normalization) == ({}, {}, True)
    assert not Layers(sides()).apply_normalization


def test_a_clt_stack_has_sides_then_ascending_layers() -> None:
    stream = sides()
    adapter = CltStack(stream)
    batch = next(adapter)
    assert (batch.shape, adapter.layer_indices, batch.is_contiguous()) == ((5, 2, 3, 4), [2, 9, 10], True)
    for side, kind in enumerate(("mlp_in", "mlp_out")):
        for place, layer in enumerate((2, 9, 10)):
            assert torch.equal(batch[:, side, place], stream.values(f"layers.{layer}.{kind}", FIRST))


def test_openmoss_batches_have_tokens_and_a_mask() -> None:
    stream = plain(2)
    batch = next(OpenMoss(stream))
    assert list(batch) == [*IN[:2], "tokens", "mask"]
    assert torch.equal(batch[IN[1]], stream.values(IN[1], FIRST))
    assert torch.equal(batch["tokens"], FIRST * 7 + 3)
    assert torch.equal(batch["mask"], torch.ones(5, dtype=torch.bool))


# --- sequences ---


@pytest.mark.parametrize("batch_size", [1, 2, 5, 31, 100])
@pytest.mark.parametrize("n_sequences", [1, 3, 7, 20])
def test_sequences_are_whole_in_order_and_padded(batch_size: int, n_sequences: int) -> None:
    stream = plain(2)
    stream.settings.batch_size = batch_size
    batches = list(Sequences(stream, n_sequences=n_sequences))
    assert [n for batch in batches for n in batch["lengths"].tolist()] == LENGTHS
    assert [len(batch["mask"]) for batch in batches[:-1]] == [n_sequences] * (len(batches) - 1)
    row = 0
    for batch in batches:
        assert batch["mask"].shape[1] == int(batch["lengths"].max())
        for place, length in enumerate(batch["lengths"].tolist()):
            rows = torch.arange(row, row + length)
            padding = batch["mask"].shape[1] - length
            assert batch["sequence"][place] == 40 + LENGTHS.index(length)
            assert batch["mask"][place].tolist() == [True] * length + [False] * padding
            assert batch["tokens"][place].tolist() == (rows * 7 + 3).tolist() + [0] * padding
            assert batch["position"][place].tolist() == (rows * 2 + 1).tolist() + [0] * padding
            for name in IN[:2]:
                assert torch.equal(batch[name][place, :length], stream.values(name, rows))
                assert not batch[name][place, length:].any()
            row += length
    assert row == N_ROWS


def test_sequences_can_have_a_fixed_length() -> None:
    batches = list(Sequences(plain(), n_sequences=3, n_tokens=12))
    assert [tuple(batch[IN[0]].shape) for batch in batches] == [(3, 12, 4), (3, 12, 4), (1, 12, 4)]
    with pytest.raises(BadInputError, match="sequence 44 has 9 rows, more than n_tokens = 8"):
        list(Sequences(plain(), n_sequences=3, n_tokens=8))


def test_sequences_take_only_whole_ones_in_order() -> None:
    for order, drop_last in (("shuffled", False), ("sequence", True)):
        with pytest.raises(BadInputError, match=rf"not of '{order}' and {drop_last}"):
            Sequences(plain(settings=settings(order=order, drop_last=drop_last)))
    with pytest.raises(BadInputError, match="n_sequences = 0"):
        Sequences(plain(), n_sequences=0)
    with pytest.raises(TypeError, match="known when they have been read"):
        len(Sequences(plain()))
    wrong: list[Any] = [{"at": 0}, [Sequences(plain()).state_dict()]]
    for state in wrong:
        with pytest.raises(BadInputError, match="not one that sequences"):
            Sequences(plain()).load_state_dict(state)


# --- every adapter ---


@every_adapter
def test_every_state_leads_to_the_batches_that_followed_it(name: str) -> None:
    adapter = ADAPTERS[name]()
    batches, states = [], [adapter.state_dict()]
    for batch in adapter:
        batches.append(batch)
        states.append(json.loads(json.dumps(adapter.state_dict())))
    assert len(batches) > 3
    for n_before, state in enumerate(states[:-1]):
        other = ADAPTERS[name]()
        next(other)
        other.load_state_dict(state)
        assert equal(list(other), batches[n_before:])


@every_adapter
def test_iter_and_next_go_on_from_the_current_place(name: str) -> None:
    batches = list(ADAPTERS[name]())
    adapter = ADAPTERS[name]()
    assert equal(next(iter(adapter)), batches[0])
    assert equal(next(adapter), batches[1])
    assert equal(next(adapter), batches[2])
    again: Adapter[Any] = pickle.loads(pickle.dumps(adapter))
    assert equal(list(adapter), batches[3:])
    assert equal(next(adapter), batches[0])
    assert equal(list(again), batches[3:])


@every_adapter
def test_next_ends_an_iteration_once(name: str) -> None:
    batches = list(ADAPTERS[name]())
    adapter = ADAPTERS[name]()
    assert equal([next(adapter) for _ in batches], batches)
    with pytest.raises(StopIteration):
        next(adapter)
    assert equal(next(adapter), batches[0])


@every_adapter
def test_tensors_are_contiguous_owned_and_of_one_batch(name: str) -> None:
    adapter = ADAPTERS[name]()
    first, second = next(adapter), next(adapter)
    kept = [tensor.clone() for tensor in leaves(second)]
    for tensor in leaves(first):
        assert tensor.is_contiguous()
        tensor.fill_(1)
    assert equal(kept, leaves(second))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "sequences"])
def test_an_adapter_is_as_long_as_its_stream(name: str) -> None:
    adapter = ADAPTERS[name]()
    assert len(adapter) == len(list(adapter)) == 7


# --- bad input ---


def test_what_does_not_fit_an_adapter_is_refused_by_name() -> None:
    with pytest.raises(BadInputError, match=r"tensors\(\) takes one hook point, not 3 \(layers\.2\.mlp_in, "):
        Tensors(plain(3))
    with pytest.raises(BadInputError, match=r"pairs\(\) takes one input and one target, not 3 and 3"):
        Pairs(sides())
    with pytest.raises(BadInputError, match=r"pairs\(\) takes one input and one target, not 1 and 0"):
        Pairs(plain())
    kinds: list[Callable[[FakeStream], Adapter[Any]]] = [Layers, CltStack]
    for kind in kinds:
        with pytest.raises(BadInputError, match="needs inputs and targets"):
            kind(plain(3))
        with pytest.raises(BadInputError, match=r"layer 9 has layers\.9\.mlp_in and layers\.9\.resid_mid"):
            kind(FakeStream((*IN, "layers.9.resid_mid"), tuple(OUT)))
    with pytest.raises(BadInputError, match=r"the same layers on both sides, not \[2, 10\] and \[2, 9, 10\]"):
        CltStack(FakeStream(tuple(IN[:2]), tuple(OUT)))


@pytest.mark.parametrize("name", ["stack", "pairs", "layers", "clt_stack"])
def test_widths_that_cannot_stack_are_named(name: str) -> None:
    kinds: dict[str, Callable[[FakeStream], Adapter[Any]]] = {
        "stack": Stack,
        "pairs": Pairs,
        "layers": Layers,
        "clt_stack": CltStack,
    }
    stream = FakeStream((IN[0],), (OUT[1],), odd=OUT[1])
    message = rf"{name}\(\) takes .* layers\.2\.mlp_in has 4 and layers\.2\.mlp_out has 5"
    with pytest.raises(BadInputError, match=message):
        kinds[name](stream)


# --- real streams ---


@pytest.mark.parametrize("normalize", [None, "standardize"])
def test_adapters_of_a_stream_give_its_batches(ds: ActivationDataset, normalize: str | None) -> None:
    options: dict[str, Any] = {"batch_size": 100, "normalize": normalize, "buffer_bytes": SMALL}
    plain = [batch.activations[WIDE] for batch in ds.stream(WIDE, **options)]
    stream = ds.stream({"inputs": [WIDE], "targets": [NARROW]}, **options)
    assert len(plain) == 8
    assert equal(list(ds.stream(WIDE, **options).tensors()), plain)
    assert equal(list(DataLoader(ds.stream(WIDE, **options).tensors(), batch_size=None)), plain)
    assert equal([dict(batch.activations) for batch in stream], list(stream_again(ds, options).dicts()))
    for batch, moss in zip(stream_again(ds, options), stream_again(ds, options).openmoss(), strict=True):
        assert torch.equal(moss["tokens"], batch.token_id.long())
        assert torch.equal(moss[WIDE], batch.activations[WIDE])
    layers = stream_again(ds, {**options, "dtype": torch.float32})
    assert layers.dtype == torch.float32


def stream_again(ds: ActivationDataset, options: dict[str, Any]) -> ActivationStream:
    return ds.stream({"inputs": [WIDE], "targets": [NARROW]}, **options)


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_a_streams_state_passes_through_an_adapter(ds: ActivationDataset, n_before: int) -> None:
    stream = ds.stream(WIDE, batch_size=100, epochs=2, normalize="unit", buffer_bytes=SMALL).tensors()
    batches = list(stream)
    adapter = ds.stream(WIDE, batch_size=100, epochs=2, normalize="unit", buffer_bytes=SMALL).tensors()
    for _ in range(n_before):
        next(adapter)
    state = json.loads(json.dumps(adapter.state_dict()))
    again = ds.stream(WIDE, batch_size=100, epochs=2, normalize="unit", buffer_bytes=SMALL).tensors()
    next(again)
    again.load_state_dict(state)
    assert len(adapter) == len(batches) == 16
    assert equal(list(again), batches[n_before:])
    assert equal(list(pickle.loads(pickle.dumps(adapter))), batches[n_before:])


def test_a_streams_standardised_layers_come_back(ds: ActivationDataset) -> None:
    stream = ds.stream({"inputs": [NARROW], "targets": [NARROW]}, batch_size=868, normalize="standardize")
    adapter = stream.layers()
    inputs, targets = next(adapter)
    assert (list(inputs), list(targets), adapter.dtype) == ([3], [3], torch.float32)
    raw = targets[3] * adapter.std_tg[3] + adapter.mean_tg[3]
    stored = {tuple(row) for row in ds[NARROW][:].tolist()}
    assert {tuple(row) for row in raw.bfloat16().tolist()} == stored


def test_sequences_of_a_stream_are_those_of_the_corpus(tmp_path: Path) -> None:
    corpus = make_corpus(Store(str(tmp_path / "corpus")), write_documents(tmp_path / "texts"))
    store, spec = Store(str(tmp_path / "data")), make_spec(corpus)
    n_rows = corpus.row_index("train", spec.keep).n_rows
    prepare(store, Header(spec=spec, n_rows=n_rows, corpus="../corpus"))
    builder = ShardBuilder(store=store, corpus=corpus, forward=FormulaModel(spec.hook_points))
    for shard in range(builder.space.n_shards):
        builder.build(shard)
    name = "layers.1.resid_post"
    stream = actlake.open(store.url).stream(name, batch_size=10, order="sequence", drop_last=False)
    seen = 0
    for batch in stream.sequences(n_sequences=4):
        exact = formula(batch["tokens"].numpy(), batch["position"].numpy(), 1, 4)
        mask = batch["mask"].numpy()
        assert np.array_equal(batch[name].view(torch.int16).numpy()[mask], exact.view(np.int16)[mask])
        assert batch["sequence"].tolist() == list(range(seen, seen + len(mask)))
        # BOS is not a row: positions count from 1, without a gap.
        assert np.array_equal(batch["position"].numpy(), np.cumsum(mask, axis=1) * mask)
        seen += len(mask)
    assert seen == len(np.unique(actlake.open(store.url)["rows/sequence"][:]))
