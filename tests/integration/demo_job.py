"""The demo's job, all of it, for a dataset on an object store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos.campaign import toml_table

DEMO = Path(__file__).parents[2] / "examples/demo.toml"

#: The rows of its two splits: 60,000 and the held-out ones that go with them.
N_ROWS = 62_026
N_SHARDS = 5


def write_demo_job(folder: Path, dataset: str, options: Mapping[str, Any]) -> Path:
    """Write the job with two workers of one thread each, since the number of threads decides the bits."""
    text = DEMO.read_text().replace('dataset = "data/demo"', f'dataset = "{dataset}"')
    assert dataset in text
    text += "[run]\nthreads = 1\nworkers = { min = 2, max = 2 }\n" + toml_table("storage_options", options)
    job = folder / "demo.toml"
    job.write_text(text)
    return job
