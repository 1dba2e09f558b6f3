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
# batch_tokens = 4_096               # padded tokens of one forward pass; part of what decides the bits
# void_nonfinite = false             # true: rows that overflowed become void rows, and do not fail their shard

[corpus]
sources = ["builtin:python-docs"]    # or globs of .txt .jsonl(.gz/.zst) .parquet, at file/gs/s3/hf:// URLs
# text_field = "text"
# metadata = ["category"]            # fields of .jsonl and .parquet to keep: rows are chosen by them when they are read
context_length = {context}
# holdout = 0.005                    # of the documents, a dataset of its own under heldout/
# max_tokens = 10_000_000            # cuts the corpus; raising it later extends the same order
# url = "data/corpora/mine"          # default: beside the dataset, shared by jobs with the same corpus

[layout]
# rows_per_shard = 131_072           # default: the largest power of two <= 262,144 that fits shard_memory
# rows_per_chunk = 1_024             # default: per hook point the power of two nearest 2 MiB
# shard_memory = "16GiB"             # host memory for the shard in the making
# order = "shuffled"                 # or "sequence": rows stay in corpus order
# codec = "blosc"                    # lossless; or "none"

[run]
# workers = 1                        # default: one for each GPU, else one
# threads = 2                        # of each worker; default: all CPUs shared out
# device = "auto"                    # or "cpu", "cuda"
# attempts = 2                       # for a shard, before the run goes on without it and ends with exit code 1
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
