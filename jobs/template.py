"""The commented job file that ``actlake init`` writes."""

import json
from pathlib import Path

from actlake.ingest.models import model_shape

_TEMPLATE = """\
# A job for 'actlake ingest': everything that is stored, and how. Lines that are commented out show the defaults.

dataset = {dataset}                # a folder or any fsspec URL, e.g. "gs://bucket/{stem}"
model = {quoted}
# revision = "main"                  # commit or branch of a Hub model; the commit is recorded

# The model has layers 0..{last}. Streams: resid_pre, attn_z, attn_out, resid_mid, mlp_in, mlp_out, resid_post.
# 'actlake points {model}' shows widths and bytes. Or a preset instead of the list:
# preset = "gemma-scope-2"           # all layers x attn_z, mlp_in, mlp_out, resid_post
#                                    # also "gemma-scope-2-subset", "clt", "crosscoder"
hook_points = ["layers.{middle}.resid_post"]

max_rows = 1_000_000                 # how much of the corpus to build now; raising it later adds shards
# seed = 0                           # of the order of sequences, the held-out split and the row permutation

[capture]
# dtype = "bfloat16"                 # or "float32"; float16 overflows on Gemma 3
# prepend_bos = true                 # no EOS is appended
# exclude = ["bos", "eos", "pad"]    # names or ids: run, but never rows
# skip_first = 0                     # nor the first tokens of each sequence
# keep = "all"                       # or "model-turns", "user-turns", "no-template", "reasoning", ["user", "system"]
# batch_tokens = 4_096               # tokens of one forward pass, padding too; part of what decides the bits
# batching = "auto"                  # or "padded", "packed" (short texts share a row); fixed when a dataset is begun
# void_nonfinite = false             # true: rows that overflowed become void rows, and do not fail their shard

[corpus]
sources = ["builtin:python-docs"]    # or globs of .txt .jsonl(.gz/.zst) .parquet .arrow, at file/gs/s3/hf:// URLs
# text_field = "text"
# messages_field = "messages"        # for chats: records with a list of {{role, content}}
# chat_template = "auto"             # the tokenizer's own, or Gemma's where it has none; "gemma" always takes that
# reasoning = "<r>(.*?)</r>"         # what a model's turn thinks; default: <think> where the chat template knows it
# id_field = "id"
# metadata = ["category"]            # fields of .jsonl and .parquet to keep: rows are chosen by them when they are read
context_length = {context}
# filters = ["language == 'en'"]     # conditions on fields, all of which must hold: == != < <= > >= in, not in
# on_bad = "raise"                   # "quarantine" puts bad documents aside and lists them
# max_document_tokens = 1_000_000    # longer documents are bad ones; default: no limit
# stride = 512                       # text tokens from one window of a long document to the next; default: no overlap
# holdout = 0.005                    # of the documents, a dataset of its own under heldout/
# max_tokens = 10_000_000            # cuts the corpus; raising it later extends the same order
# replies = {{ max_new_tokens = 256, temperature = 1.0, n = 1 }}  # the model completes texts and chats first
# url = "data/corpora/mine"          # default: beside the dataset, shared by jobs with the same corpus

[layout]
# rows_per_shard = 131_072           # default: the largest power of two <= 262,144 that fits shard_memory
# rows_per_chunk = 1_024             # default: per hook point the power of two nearest 2 MiB
# shard_memory = "16GiB"             # host memory of one shard; a worker has two in the making
# order = "shuffled"                 # or "sequence": rows stay in corpus order
# codec = "blosc"                    # lossless; or "none"

[run]
# workers = 1                        # default: one for each GPU, else one; on a cluster also {{ min = 1, max = 16 }}
# threads = 2                        # of each worker; default: all CPUs shared out
# device = "auto"                    # or "cpu", "cuda"
# attempts = 2                       # for a shard, before the run goes on without it and ends with exit code 1
# gpus_per_worker = 1                # more of them share the layers of a model that one cannot hold
# resources = {{ spot = 1.0 }}         # custom resources of Ray that a worker wants
# placement = "pack"                 # or "spread": over the nodes of the cluster
# start_timeout = 600                # seconds to wait while the cluster has too few workers
# device_map = "auto"                # how they share them; or a table of modules and devices
# attn_implementation = "sdpa"       # or "eager", "flash_attention_2", ...: the last bits differ, and are recorded
# compile = false                    # true: torch.compile between the hook points

[plan]                               # what 'actlake plan' reckons with; docs/planning.md has every key
# machine = "here"                   # or one of jobs/plan/rates.toml, e.g. "a3-highgpu-8g"
# months = 1                         # how long the dataset is kept

[budget]                             # a run that would exceed it is refused before it writes
# max_bytes = "2 TB"
# max_cost = 500                     # dollars: computing, requests and storage for plan.months
"""


def job_template(model: str) -> str:
    """Return a job file for the model, ready to run; raises what ``model_shape`` raises for an unknown one."""
    shape = model_shape(model)
    # The last part even of '.' or '~'; a Hub id has one too.
    stem = Path(model).expanduser().resolve().name
    return _TEMPLATE.format(
        dataset=_quoted(f"data/{stem}"),
        stem=stem,
        model=model,
        quoted=_quoted(model),
        last=shape.n_layers - 1,
        middle=shape.n_layers // 2,
        context=min(1024, shape.context_length),
    )


def _quoted(text: str) -> str:
    # A JSON string is a TOML string, but for the surrogate pairs of escaped characters.
    return json.dumps(text, ensure_ascii=False)
