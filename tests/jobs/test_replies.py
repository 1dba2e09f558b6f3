"""Jobs whose prompts the model completes: both engines, a crash in the middle, and what readers get."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from chatting import byte_tokenizer, save_chat_model
from runs import contents, run_until

import actlake
from actlake.ingest.corpus_redact import redact_corpus
from actlake.ingest.models import load_tokenizer, resolve_model
from actlake.jobs import replies as jobs_replies
from actlake.jobs.corpus import open_corpus, read_corpus_job
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import Job, RepliesOptions, parse_job, read_job
from actlake.jobs.plan.rates import read_rates
from actlake.jobs.plan.sources import TextRate, first_documents, source_tokens
from actlake.jobs.readiness import Listener
from actlake.storage.corpus import Corpus
from actlake.storage.errors import JobFileError, SourceError, UnknownNameError
from actlake.storage.redaction import redacted_name
from actlake.storage.rowspace import ROLES
from actlake.storage.stores import Store, resolve_url

N_PROMPTS = 40
#: At most 32 replies in a batch.
N_BATCHES = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 3 of two narrow layers with a tokenizer of bytes."""
    return save_chat_model(tmp_path_factory.mktemp("models") / "talkative", initializer_range=0.5)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, as texts and as chats, and one conversation that needs no reply."""
    records: list[dict[str, Any]] = [
        {"id": f"p{i}", "text": f"Question {i}? " + "please " * (i % 4), "kind": "text"} for i in range(N_PROMPTS - 1)
    ]
    user = {"role": "user", "content": "Hi"}
    records.append({"id": "asked", "messages": [user, {"role": "model", "content": "Oh."}, user], "kind": "chat"})
    records.append({"id": "whole", "messages": [user, {"role": "model", "content": "Hello."}], "kind": "chat"})
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


WriteJob = Callable[..., Path]


@pytest.fixture(scope="module")
def job_file(model: Path, prompts: Path) -> WriteJob:
    """Return a function that writes a job into a folder; keyword arguments are added to ``[corpus.replies]``."""

    def write(folder: Path, source: Path = prompts, **replies: Any) -> Path:
        lines = {"max_new_tokens": 12, "n": 2} | replies
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "job.toml"
        path.write_text(
            f'dataset = "{folder}/ds"\nmodel = "{model}"\nhook_points = ["layers.1.resid_post"]\n'
            f'[capture]\nbatch_tokens = 512\nkeep = "model-turns"\n'
            f'[corpus]\nsources = ["{source}"]\nmessages_field = "messages"\nmetadata = ["kind", "ending"]\n'
            f'context_length = 128\nholdout = 0.2\nurl = "{folder}/corpus"\n'
            "[layout]\nrows_per_shard = 256\nrows_per_chunk = 32\n[run]\nthreads = 1\n"
            "[corpus.replies]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
        )
        return path

    return write


def test_a_plan_needs_no_label_that_replies_bring(tmp_path: Path, job_file: WriteJob) -> None:
    job = read(job_file(tmp_path))
    assert job.corpus.metadata == ("kind", "ending")
    tokenizer = load_tokenizer(resolve_model(job.model))
    assert len(list(first_documents(job, tokenizer, 10**9))) == N_PROMPTS + 1
    strange = replace(job, corpus=replace(job.corpus, metadata=("kynd", "ending")))
    with pytest.raises(UnknownNameError, match="'kynd'; did you mean 'kind'"):
        list(first_documents(strange, tokenizer, 10**9))


class Counter(Listener):
    """Keeps how many replies were missing, and generated."""

    def __init__(self) -> None:
        self.missing = self.done = 0

    def replies(self, n_done: int, n_missing: int) -> None:
        self.done, self.missing = n_done, n_missing


def read(path: Path) -> Job:
    return read_corpus_job(path, None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, job_file: WriteJob) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    counter = Counter()
    ingest(read(job_file(folder)), engine="local", listener=counter)
    assert (counter.done, counter.missing) == (2 * N_PROMPTS, 2 * N_PROMPTS)
    return folder


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a model that is loaded for replies be an error."""

    def refuse(_: Any) -> None:
        raise AssertionError("the model was loaded to generate replies")

    monkeypatch.setattr(jobs_replies.ReplyWorker, "_start", refuse)


def batches(folder: Path) -> list[Path]:
    return sorted((folder / "corpus" / "replies").glob("*.parquet"))


def test_replies_are_captured_with_their_prompts_by_role(undisturbed: Path) -> None:
    ds = actlake.open(undisturbed / "ds")
    corpus = Corpus.open(resolve_url(ds.header.corpus, ds.store))
    assert len(batches(undisturbed)) == N_BATCHES
    corpus.verify()
    tokenizer, n_documents, endings = byte_tokenizer(), 0, set()
    prompts: dict[str, set[str]] = {split: set() for split in corpus.splits}
    stored = {row["id"]: row for path in batches(undisturbed) for row in pq.read_table(path).to_pylist()}
    assert len(stored) == 2 * N_PROMPTS
    for split, info in corpus.splits.items():
        n_documents += info.n_documents
        for sequence in corpus.sequences(split, 0, info.n_sequences):
            endings.add(sequence.metadata["ending"])
            if sequence.document == "whole":
                continue
            prompts[split].add(sequence.document.partition("#")[0])
            row = stored[sequence.document]
            spoken = sequence.tokens[sequence.roles == ROLES["model"]].tolist()
            contents = [one["content"].strip() for one in row["messages"] if one["role"] == "model"]
            assert tokenizer.decode(spoken, skip_special_tokens=False) == "".join(contents)
            assert sequence.metadata["ending"] == row["ending"]
            assert sequence.turns is not None
            assert sequence.turns.max() == len(row["messages"]) - 1
    assert n_documents == 2 * N_PROMPTS + 1
    # Both replies to a prompt are in one split.
    assert prompts["heldout"]
    assert prompts["train"].isdisjoint(prompts["heldout"])
    assert endings >= {"length", None}
    assert set(ds["rows/role"][:].tolist()) == {ROLES["model"]}
    assert stored["p0#0"]["messages"][0] == stored["p0#1"]["messages"][0]
    assert stored["p0#0"]["tokens"] != stored["p0#1"]["tokens"]


@pytest.mark.usefixtures("no_model")
def test_what_is_generated_is_never_generated_again(tmp_path: Path, undisturbed: Path, job_file: WriteJob) -> None:
    ingest(read(job_file(undisturbed)), engine="local")
    # Not even where only the replies are left.
    folder = tmp_path / "again"
    job = job_file(folder)
    (folder / "corpus").mkdir()
    (undisturbed / "corpus" / "replies").rename(folder / "corpus" / "replies")
    try:
        ingest(read(job), engine="local")
    finally:
        (folder / "corpus" / "replies").rename(undisturbed / "corpus" / "replies")
    assert contents(folder / "ds") == contents(undisturbed / "ds")


@pytest.mark.usefixtures("no_model")
def test_conversations_are_a_source_of_chats_elsewhere(
    tmp_path: Path, undisturbed: Path, model: Path, prompts: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    whole.write_text(prompts.read_text().splitlines()[-1])
    job = {
        "dataset": f"{tmp_path}/ds",
        "model": str(model),
        "hook_points": ["layers.0.resid_post"],
        "corpus": {
            "sources": [f"{undisturbed}/corpus/replies/*.parquet", str(whole)],
            "messages_field": "messages",
            "metadata": ["kind", "ending"],
            "context_length": 128,
            "holdout": 0.2,
            "split_by": "prompt",
        },
    }
    ingest(parse_job(job), engine="local")
    ds = actlake.open(tmp_path / "ds")
    here, there = Corpus.open(resolve_url(ds.header.corpus, ds.store)), Corpus.open(Store(undisturbed / "corpus"))
    assert here.corpus_id == there.corpus_id
    assert here.splits["train"].tokens_by_label == there.splits["train"].tokens_by_label


def test_a_killed_run_generates_just_what_is_missing(tmp_path: Path, undisturbed: Path, job_file: WriteJob) -> None:
    job = job_file(tmp_path)
    run_until(job, "local", lambda: bool(batches(tmp_path)))
    before = {path: path.stat().st_mtime_ns for path in batches(tmp_path)}
    assert before
    counter = Counter()
    ingest(read(job), engine="local", listener=counter)
    assert counter.done == counter.missing < 2 * N_PROMPTS
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "corpus") == contents(undisturbed / "corpus")
    assert contents(tmp_path / "ds") == contents(undisturbed / "ds")


def test_ray_gives_the_same_replies(tmp_path: Path, undisturbed: Path, job_file: WriteJob, ray_cluster: object) -> None:
    job = read(job_file(tmp_path))
    ref, counter = resolve_model(job.model), Counter()
    open_corpus(job, ref, load_tokenizer(ref), counter, engine="ray")
    assert counter.done == counter.missing == 2 * N_PROMPTS
    expected = contents(undisturbed / "corpus")
    assert contents(tmp_path / "corpus") == {key: value for key, value in expected.items() if "rows/" not in key}


def test_a_worker_that_dies_is_replaced_and_its_item_done_again(tmp_path: Path, ray_cluster: object) -> None:
    from actlake.jobs.engines.ray_engine import calls
    from actlake.jobs.work import ModelOrder

    class Mortal:
        def __init__(self, order: ModelOrder) -> None:
            self._mark = Path(order.model)

        def work(self, item: int) -> int:
            if item == 1 and not self._mark.exists():
                self._mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if item == 3:
                raise SourceError("three is too many")
            return item

    order = ModelOrder(
        model=f"{tmp_path}/died", revision=None, fingerprint="", dtype="bfloat16", device="cpu", n_threads=1
    )
    assert sorted(calls(Mortal, order, "work", [0, 1, 2], attempts=2, workers=1)) == [0, 1, 2]
    assert (tmp_path / "died").exists()
    with pytest.raises(SourceError, match="three is too many"):
        list(calls(Mortal, order, "work", [3], attempts=2, workers=1))


def test_a_plan_reckons_with_the_longest_replies(tmp_path: Path, job_file: WriteJob, prompts: Path) -> None:
    job = read(job_file(tmp_path))
    measured = TextRate(bytes_per_token=2.0, document_tokens=10.0)
    found = source_tokens(job, read_rates(), measured)
    n_documents = prompts.stat().st_size / 2.0 / 10.0
    assert found.document_tokens == 10 + 12
    assert found.n_tokens == pytest.approx(2 * n_documents * (10 + 12))


def test_bad_prompts_are_named_before_anything_is_generated(tmp_path: Path, job_file: WriteJob, no_model: None) -> None:
    records = [{"id": "good", "text": "Hi"}, {"id": "long", "text": "x" * 200}]
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(SourceError, match=r"document 'long', some\.jsonl, line 2 .*max_new_tokens = 12 more than"):
        ingest(read(job_file(tmp_path, source)), engine="local")
    source.write_text(json.dumps({"id": "w", "messages": [{"role": "model", "content": "Hello."}]}))
    with pytest.raises(SourceError, match="the sources hold no prompt that can be used"):
        ingest(read(job_file(tmp_path, source)), engine="local")


def test_a_redacted_conversation_is_gone_and_its_corpus_whole(tmp_path: Path, undisturbed: Path) -> None:
    shutil.copytree(undisturbed / "corpus", tmp_path / "corpus")
    store = Store(tmp_path / "corpus")
    corpus = redact_corpus(store, ["p3#1"]).corpus
    corpus.verify()
    stored = {row["id"]: row for path in batches(tmp_path) for row in pq.read_table(path).to_pylist()}
    assert "p3#1" not in stored
    assert stored[redacted_name("p3#1")]["messages"] == []
    assert stored["p3#0"]["messages"][0]["content"].startswith("Question 3?")


def test_only_the_model_itself_replies(tmp_path: Path, job_file: WriteJob) -> None:
    with pytest.raises(JobFileError, match=r"replies\.model = 'gpt': .*messages_field = 'messages'"):
        read(job_file(tmp_path, model="gpt"))
    with pytest.raises(JobFileError, match=r"unknown key 'corpus\.replies\.max_tokens'"):
        read(job_file(tmp_path, max_tokens=3))


def test_the_example_is_a_job_with_replies() -> None:
    job = read_job(Path(__file__).parents[2] / "examples/chat_replies.toml")
    assert job.corpus.replies == RepliesOptions(max_new_tokens=128)
