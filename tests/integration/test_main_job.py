"""The main job on the real Gemma 3 270M, with Ray: what is stored is what the model computes, and it is used."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import actlake
import actlake.storage.zarr_dtype
from actlake.ingest.batching import plan_batches
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import resolve_model
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.shards.verify import verify
from actlake.storage.corpus import Corpus
from actlake.storage.stores import resolve_url

pytestmark = pytest.mark.slow

POINTS = ["layers.0.resid_pre", "layers.9.attn_z", "layers.9.attn_out", "layers.9.resid_mid", "layers.9.mlp_in"]
POINTS += ["layers.9.mlp_out", "layers.9.resid_post", "layers.17.resid_post"]

#: Relative error of a row computed alone against the same row computed in a batch, bfloat16, norm over norm.
#: Measured on this text: 0.2-3 % by layer; another batch shape rounds differently at every one of 18 layers.
ALONE = 0.10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> actlake.ActivationDataset:
    folder = tmp_path_factory.mktemp("main-job")
    listed = ", ".join(f'"{point}"' for point in POINTS)
    (folder / "job.toml").write_text(
        f'dataset = "{folder}/ds"\nmodel = "gemma-3-270m-gguf"\nhook_points = [{listed}]\nmax_rows = 1_500\n'
        '[capture]\nbatch_tokens = 512\nbatching = "padded"\n'
        '[corpus]\nsources = ["builtin:python-docs"]\ncontext_length = 128\n'
        "holdout = 0.05\n[layout]\nrows_per_shard = 1_024\nrows_per_chunk = 256\n[run]\nthreads = 2\n"
    )
    ingest(read_job(folder / "job.toml"), engine="ray")
    return actlake.open(folder / "ds")


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    before = torch.get_num_threads()
    # As in the worker: the order of the sums depends on the threads.
    torch.set_num_threads(2)
    yield load_model(resolve_model("gemma-3-270m-gguf"))
    torch.set_num_threads(before)


def hooked_forward(model: LoadedModel, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the text model with hooks written here, at the modules that facts of the architecture name."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            found[name] = (args[0] if args else kwargs["hidden_states"]).clone()

        return hook

    layers: Any = model.text.layers
    block = layers[9]
    handles = [
        layers[0].register_forward_pre_hook(keep_input("layers.0.resid_pre"), with_kwargs=True),
        block.self_attn.o_proj.register_forward_pre_hook(keep_input("layers.9.attn_z"), with_kwargs=True),
        block.post_attention_layernorm.register_forward_hook(keep("layers.9.attn_out")),
        block.pre_feedforward_layernorm.register_forward_pre_hook(keep_input("layers.9.resid_mid"), with_kwargs=True),
        block.pre_feedforward_layernorm.register_forward_hook(keep("layers.9.mlp_in")),
        block.post_feedforward_layernorm.register_forward_hook(keep("layers.9.mlp_out")),
        block.register_forward_hook(keep("layers.9.resid_post")),
        layers[17].register_forward_hook(keep("layers.17.resid_post")),
    ]
    try:
        with torch.no_grad():
            model.text(input_ids=input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def corpus_of(ds: actlake.ActivationDataset) -> Corpus:
    return Corpus.open(resolve_url(ds.header.corpus, ds.store))


def test_random_rows_have_the_bits_of_a_plain_forward_of_their_batch(
    dataset: actlake.ActivationDataset, model: LoadedModel
) -> None:
    corpus, spec = corpus_of(dataset), dataset.spec
    index = corpus.row_index("train", spec.keep)
    chosen = index.sequences_of(range(spec.rows_per_shard))
    sequences = corpus.sequences("train", chosen.start, chosen.stop)
    batches = plan_batches([len(s.tokens) for s in sequences], spec.batch_tokens, 128)
    columns = dataset.rows(slice(0, spec.rows_per_shard))
    n_compared = 0
    for batch in (batches[0], batches[len(batches) // 2], batches[-1]):
        ids = torch.zeros(len(batch.members), batch.n_tokens, dtype=torch.int64)
        for b, member in enumerate(batch.members):
            ids[b, : len(sequences[member].tokens)] = torch.from_numpy(sequences[member].tokens.astype(np.int64))
        forward = hooked_forward(model, ids)
        for b, member in enumerate(batch.members):
            rows = np.flatnonzero(columns["sequence"] == sequences[member].index)[::7]
            positions = columns["position"][rows]
            for point in POINTS:
                assert torch.equal(dataset.tensor(point, rows), forward[point][b, positions]), point
            assert (columns["token_id"][rows] == ids[b, positions].numpy()).all()
            n_compared += len(rows)
    assert n_compared > 50


def test_rows_alone_are_within_tolerance_of_rows_in_a_batch(
    dataset: actlake.ActivationDataset, model: LoadedModel
) -> None:
    corpus, columns = corpus_of(dataset), dataset.rows(slice(0, 1024))
    number = int(columns["sequence"][0])
    sequence = corpus.sequences("train", number, number + 1)[0]
    alone = hooked_forward(model, torch.from_numpy(sequence.tokens.astype(np.int64))[None])
    rows = np.flatnonzero(columns["sequence"] == number)
    for point in POINTS:
        stored = dataset.tensor(point, rows).float()
        computed = alone[point][0, columns["position"][rows]].float()
        error = ((stored - computed).norm(dim=1) / computed.norm(dim=1)).max()
        assert error < ALONE, f"{point}: {error:.4f}"


def test_the_dataset_is_whole_and_opens_with_plain_zarr(dataset: actlake.ActivationDataset) -> None:
    assert dataset.complete
    assert dataset.n_rows == 1500
    for part in (dataset, dataset.heldout):
        report = verify(part)
        assert report.problems == ()
        assert report.n_rows == part.n_rows
    group = zarr.open_group(f"{dataset.url}/arrays", mode="r")
    plain = np.asarray(group["layers.17.resid_post"])
    assert np.array_equal(plain.view("u2"), dataset["layers.17.resid_post"][:].view("u2"))
    assert 1.2 < dataset.n_rows * dataset.spec.nbytes_per_row / dataset.reader.manifest.nbytes < 2.0


def test_the_last_layer_is_not_normed(dataset: actlake.ActivationDataset, model: LoadedModel) -> None:
    rows = dataset.tensor("layers.17.resid_post", slice(0, 64))
    norm: Any = model.text.norm
    with torch.no_grad():
        assert not torch.allclose(norm(rows).float(), rows.float(), rtol=0.5)
    # After the final norm, rows of this model have a root mean square far below the residual's.
    assert rows.float().square().mean().sqrt() > 100


def test_a_stream_delivers_every_row_once(dataset: actlake.ActivationDataset) -> None:
    point = "layers.9.resid_post"
    rows = []
    for batch in dataset.stream([point], batch_size=256, seed=3, drop_last=False):
        assert torch.equal(batch[point], dataset.tensor(point, batch.row.numpy()))
        rows.append(batch.row)
    assert sorted(torch.cat(rows).tolist()) == list(range(1500))
