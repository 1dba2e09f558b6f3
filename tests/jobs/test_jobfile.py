"""Job files: what is read, and what each mistake is answered with."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from actlake.jobs.jobfile import Job, RepliesOptions, parse_job, read_job
from actlake.storage.errors import BadInputError, JobFileError

MINIMAL = """
dataset = "data/demo"
model = "gemma-3-270m-gguf"
hook_points = ["layers.9.resid_post"]
[corpus]
sources = ["builtin:python-docs"]
"""


def parse(text: str, **changes: Any) -> Job:
    return parse_job(tomllib.loads(text) | changes)


def test_the_defaults_are_those_of_the_readme() -> None:
    job = parse(MINIMAL)
    assert (job.max_rows, job.seed, job.preset, job.revision) == (None, 0, None, None)
    assert job.capture.dtype == "bfloat16"
    assert job.capture.prepend_bos is True
    assert job.capture.exclude == ("bos", "eos", "pad")
    assert job.capture.skip_first == 0
    assert (job.corpus.text_field, job.corpus.context_length, job.corpus.holdout) == ("text", 1024, 0.005)
    assert (job.layout.rows_per_shard, job.layout.rows_per_chunk, job.layout.codec) == (None, None, "blosc")


def test_every_value_of_the_file_arrives(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        'dataset = "gs://bucket/a"\nmodel = "google/gemma-3-4b-pt"\nrevision = "abc"\npreset = "clt"\n'
        "max_rows = 60_000\nseed = 7\n"
        '[capture]\ndtype = "float32"\nprepend_bos = false\nexclude = ["bos", 105]\n'
        'keep = "model-turns"\n'
        'skip_first = 4\nbatch_tokens = 512\nbatching = "packed"\nvoid_nonfinite = true\n'
        '[corpus]\nsources = ["a/*.txt", "b.parquet"]\ntext_field = "body"\ncontext_length = 512\nholdout = 0\n'
        'max_tokens = 1_000\nurl = "data/c"\nmetadata = ["category", "turns"]\n'
        'messages_field = "chat"\nid_field = "key"\nfilters = ["language == \'en\'"]\nchat_template = "gemma"\n'
        'reasoning = "<r>(.*?)</r>"\non_bad = "quarantine"\nmax_document_tokens = 9_000\nstride = 256\n'
        'split_by = "prompt"\n'
        "replies = {max_new_tokens = 99, temperature = 0.5, seed = 3, n = 2}\n"
        '[layout]\nrows_per_shard = 16_384\nrows_per_chunk = 1_024\nrows_per_block = 8_192\nshard_memory = "2GiB"\n'
        'order = "sequence"\ncodec = "none"\n'
        '[run]\nworkers = 2\nthreads = 3\ndevice = "cpu"\nattempts = 5\n'
        'resources = { spot = 1 }\nplacement = "spread"\nstart_timeout = 60\n'
        '[storage_options]\ntoken = "anon"\n'
    )
    job = read_job(path)
    assert (job.dataset, job.model, job.revision, job.preset, job.hook_points) == (
        "gs://bucket/a", "google/gemma-3-4b-pt", "abc", "clt", None,
    )  # fmt: skip
    assert (job.max_rows, job.seed) == (60_000, 7)
    assert vars(job.capture) == {
        "dtype": "float32", "prepend_bos": False, "exclude": ("bos", 105), "skip_first": 4, "batch_tokens": 512,
        "keep": "model-turns",
        "batching": "packed", "void_nonfinite": True,
    }  # fmt: skip
    assert vars(job.corpus) == {
        "sources": ("a/*.txt", "b.parquet"), "text_field": "body", "context_length": 512, "holdout": 0.0,
        "max_tokens": 1000, "url": "data/c", "metadata": ("category", "turns"),
        "messages_field": "chat", "id_field": "key", "filters": ("language == 'en'",), "chat_template": "gemma",
        "reasoning": "<r>(.*?)</r>", "on_bad": "quarantine", "max_document_tokens": 9000, "stride": 256,
        "split_by": "prompt", "weights": {}, "quotas": {},
        "replies": RepliesOptions(model="same", max_new_tokens=99, temperature=0.5, seed=3, n=2),
    }  # fmt: skip
    assert vars(job.layout) == {
        "rows_per_shard": 16_384, "rows_per_chunk": 1_024, "rows_per_block": 8_192, "shard_memory": 2 * 2**30,
        "order": "sequence", "codec": "none",
    }  # fmt: skip
    assert vars(job.run) == {
        "workers": 2, "threads": 3, "device": "cpu", "attempts": 5, "attn_implementation": None, "compile": False,
        "device_map": None, "gpus_per_worker": 1, "resources": {"spot": 1}, "placement": "spread",
        "start_timeout": 60.0,
    }  # fmt: skip
    assert job.storage_options == {"token": "anon"}
    assert "anon" not in repr(job)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datset": "x"}, r"unknown key 'datset'; did you mean 'dataset'\?"),
        ({"capture": {"prepend_boss": True}}, r"unknown key 'capture\.prepend_boss'; did you mean 'prepend_bos'\?"),
        ({"layout": {"zzz": 1}}, r"unknown key 'layout\.zzz'; valid names: codec, order, rows_per_block"),
        ({"max_rows": "many"}, r"max_rows = 'many' must be a whole number"),
        ({"max_rows": True}, r"max_rows = True must be a whole number"),
        ({"max_rows": 0}, r"max_rows = 0 must be at least 1"),
        ({"hook_points": "layers.9.resid_post"}, r"hook_points = 'layers\.9\.resid_post' must be a list"),
        ({"preset": "clt"}, r"either hook_points.* or preset"),
        ({"capture": {"dtype": "float16"}}, r"65,504.*use 'bfloat16'"),
        ({"capture": {"batching": "pack"}}, r"not one of auto, padded, packed; did you mean 'packed'\?"),
        ({"capture": {"dtype": "bfloat1"}}, r"not one of bfloat16, float32; did you mean 'bfloat16'\?"),
        ({"capture": {"exclude": [1.5]}}, r"capture\.exclude = 1\.5 must be text or a whole number"),
        ({"capture": {"keep": "model"}}, r"capture\.keep = 'model' is not one of all, .*; did you mean 'model-turns'"),
        ({"capture": {"keep": ["usr"]}}, r"keep: no role 'usr'; did you mean 'user'\?"),
        ({"capture": {"keep": []}}, r"capture\.keep = \[\] keeps nothing"),
        ({"capture": {"keep": 3}}, r"capture\.keep = 3 must be text"),
        ({"corpus": {"sources": ["a"], "filters": ["x"]}}, r"filters: 'x' is no condition"),
        (
            {"corpus": {"sources": ["a"], "chat_template": "llama"}},
            r"chat_template = 'llama' is not one of auto, gemma",
        ),
        ({"corpus": {"sources": ["a"], "reasoning": "("}}, r"reasoning = '\(' is no regular expression"),
        ({"corpus": {"sources": ["a"], "on_bad": "skip"}}, r"on_bad = 'skip' is not one of raise, quarantine"),
        ({"corpus": {"sources": ["a"], "stride": 0}}, r"corpus\.stride = 0 must be at least 1"),
        ({"corpus": {}}, r"'corpus\.sources' is missing; add e\.g\. sources"),
        ({"corpus": {"sources": []}}, r"corpus\.sources is empty"),
        ({"corpus": {"sources": ["a"], "holdout": 1.0}}, r"holdout = 1\.0 is a share of the documents"),
        ({"corpus": {"sources": ["a"], "context_length": 1}}, r"context_length = 1 must be at least 2"),
        ({"corpus": 3}, r"corpus = 3 must be a table"),
        ({"layout": {"codec": "zip"}}, r"layout\.codec = 'zip' is not one of blosc, none"),
        ({"layout": {"shard_memory": "lots"}}, r"shard_memory = 'lots' is no size in bytes; write e\.g\. '16GiB'"),
        ({"run": {"workers": 0}}, r"run\.workers = 0 must be at least 1"),
        ({"seed": -1}, r"seed = -1 must be in"),
    ],
)
def test_a_mistake_is_answered_with_the_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        parse(MINIMAL, **changes)


@pytest.mark.parametrize("missing", ["dataset", "model", "corpus"])
def test_a_missing_key_is_named_with_an_example(missing: str) -> None:
    table = tomllib.loads(MINIMAL)
    del table[missing]
    with pytest.raises(JobFileError, match=rf"'{missing}' is missing; add"):
        parse_job(table)


def test_a_file_that_is_absent_or_no_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=r"no job file .*gone\.toml.*actlake init"):
        read_job(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("dataset = ")
    with pytest.raises(JobFileError, match=r"bad\.toml is not valid TOML"):
        read_job(tmp_path / "bad.toml")
    (tmp_path / "typo.toml").write_text(MINIMAL + "contxt_length = 3\n")
    with pytest.raises(JobFileError, match=r"typo\.toml: unknown key 'corpus\.contxt_length'; did you mean 'context_"):
        read_job(tmp_path / "typo.toml")


def test_roles_are_named_one_by_one_or_together() -> None:
    for keep, roles in (("all", ()), (["user", "system"], ("user", "system")), ("model-turns", ("model", "reasoning"))):
        assert parse(MINIMAL, capture={"keep": keep}).capture.roles == roles
