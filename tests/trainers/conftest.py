"""A dataset to learn from, and the blocks of docs/trainers.md run on it.

Only the tests whose package is installed are collected: `make test-trainers` has an environment with all of them.
"""

import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_dataset import make_sparse

import actlake

_PACKAGES = {
    "test_sae_lens.py": "sae_lens",
    "test_sparsify.py": "sparsify",
    "test_dictionary_learning.py": "dictionary_learning",
    "test_crosslayer_coding.py": "clt",
    "test_openmoss.py": "llamascopium",
}
collect_ignore = [name for name, package in _PACKAGES.items() if find_spec(package) is None]

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"


@pytest.fixture(scope="session")
def ds(tmp_path_factory: pytest.TempPathFactory) -> "actlake.ActivationDataset":
    return make_sparse(str(tmp_path_factory.mktemp("sparse") / "data")).open()


@pytest.fixture
def run(ds: "actlake.ActivationDataset", tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the block under a heading of docs/trainers.md, and gives its names."""

    def run_block(heading: str, **changes: Any) -> dict[str, Any]:
        section = PAGE.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        torch.manual_seed(0)
        names: dict[str, Any] = {"ds": ds, "torch": torch, "folder": str(tmp_path), **_shared(), **changes}
        with warnings.catch_warnings():
            # What the packages warn of is theirs to mend.
            warnings.simplefilter("ignore")
            exec(compile(code, f"docs/trainers.md, {heading}", "exec"), names)
        return names

    return run_block


def _shared() -> dict[str, Any]:
    """Return the names of the page's first block, of the sizes of a test."""
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace('ds = actlake.open("data/demo")\n', "")
    names: dict[str, Any] = {}
    exec(code, names)
    return names | {"batch_size": 256, "n_latents": 128, "k": 4, "steps": 200, "lr": 1e-2}
