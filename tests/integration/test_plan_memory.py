"""The memory that a plan gives a worker is what a worker of the real Gemma 3 270M takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from actlake.jobs.jobfile import read_job
from actlake.jobs.plan.gather import plan_job

_JOB = """\
dataset = "{folder}/ds"
model = "{model}"
hook_points = ["layers.[0-8].*"]
max_rows = 3072
[capture]
batch_tokens = 1024
[corpus]
sources = ["builtin:python-docs"]
context_length = 512
holdout = 0.0
[layout]
rows_per_shard = 1024
[run]
threads = 1
"""

#: Runs the job's driver as far as the work order; then, in a process of its own, one worker that has as many shards in
#: the making as it may. Weights are mapped: a long run has read every page of them, three shards those of their tokens.
_DRIVER = """
import pickle, sys
from actlake.jobs import ingestion
from actlake.jobs.jobfile import read_job
def keep(job, ready, order, *rest):
    pickle.dump((order, list(ready.plan.missing)), open(sys.argv[2], "wb"))
    return []
ingestion._build_missing = keep
ingestion.ingest(read_job(sys.argv[1]), engine="local")
"""
_WORKER = """
import json, pickle, sys
from concurrent.futures import ThreadPoolExecutor
import torch
from actlake.jobs.work import Worker
order, tasks = pickle.load(open(sys.argv[1], "rb"))
worker = Worker(order)
with ThreadPoolExecutor(worker.n_concurrent) as threads:
    assert len(list(threads.map(worker.build, tasks))) == 3
for parameter in worker._model.text.parameters():
    parameter.detach().view(torch.uint8).flatten()[::4096].sum()
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(json.dumps(int(peak[0].split()[1]) * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_workers_peak_memory_is_within_15_percent_of_the_plan(gemma_270m: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.toml"
    job.write_text(_JOB.format(folder=tmp_path, model=gemma_270m))
    order = tmp_path / "order.pickle"
    subprocess.run([sys.executable, "-c", _DRIVER, str(job), str(order)], check=True, timeout=550)
    done = subprocess.run(
        [sys.executable, "-c", _WORKER, str(order)], check=True, timeout=550, capture_output=True, text=True
    )
    memory = plan_job(read_job(job)).memory
    # The worker ran without Ray, for which a plan adds 90 MB.
    assert json.loads(done.stdout) == pytest.approx(memory.host - 90_000_000, rel=0.15)
