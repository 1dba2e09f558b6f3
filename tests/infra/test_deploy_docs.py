"""The commands of the pages on deployment: each is one that its program takes, as far as that is known here."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest
import typer

from actlake.jobs.cli import cluster, demo, ingest, query, report, sql, stats, verify  # noqa: F401 - each registers
from actlake.jobs.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs/deploy-gcp.md", ROOT / "docs/deploy-anywhere.md"]
MODULE = ROOT / "infra/terraform/gcp"


def commands(program: str = "") -> Iterator[list[str]]:
    """Yield the words of every command line of the pages, or of one program."""
    for page in PAGES:
        for code in re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in code.splitlines():
                words = shlex.split(line)
                if words and program in ("", words[0]):
                    yield words


def parse_actlake(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    assert words[0] in group.commands, f"no command {words[0]!r}"
    group.commands[words[0]].make_context(words[0], words[1:])


def test_only_programs_that_are_looked_at_are_named() -> None:
    known = {"actlake", "aws", "cp", "docker", "gcloud", "helm", "kubectl", "make", "pip", "ray", "terraform"}
    assert {words[0] for words in commands()} == known


def test_every_command_of_ours_parses() -> None:
    found = list(commands("actlake"))
    assert len(found) >= 6
    for words in found:
        parse_actlake(words[1:])
    for words in commands("ray"):
        if words[1] == "exec":
            parse_actlake(shlex.split(words[3])[1:])


def test_every_file_that_a_command_names_is_there() -> None:
    # Written by an earlier command, or the user's own.
    made = {"job.toml", "hf-token.txt", "storage.env", "infra/terraform/gcp/terraform.tfvars"}
    for words in commands():
        for word in words[1:]:
            for path in re.findall(r"(?:infra/[\w./-]+|[\w-]+\.(?:toml|txt|env|yaml|json)\b)", word):
                assert path in made or (ROOT / path).exists(), f"{path} in {words}"


def test_kubectl_applies_what_kustomize_builds() -> None:
    for words in commands("kubectl"):
        if "-k" in words:
            assert (ROOT / words[words.index("-k") + 1] / "kustomization.yaml").is_file()
    assert sum("-k" in words for words in commands("kubectl")) == 4


def test_secrets_are_those_that_the_pods_read() -> None:
    manifest = (ROOT / "infra/kuberay/base/cluster.yaml").read_text()
    created = [words[4] for words in commands("kubectl") if words[1:4] == ["create", "secret", "generic"]]
    assert set(created) == {"huggingface", "actlake-storage"}
    for name in created:
        assert re.search(rf"name: {name}\b", manifest)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[1] for words in commands("make")} <= set(targets)


def test_terraforms_names_are_those_of_the_module() -> None:
    outputs = {name.strip('"') for block in hcl2.loads((MODULE / "outputs.tf").read_text())["output"] for name in block}
    assert {words[1] for words in commands("terraform")} == {f"-chdir={MODULE.relative_to(ROOT)}"}
    assert {words[2] for words in commands("terraform")} <= {"init", "apply", "output"}
    named = {words[-1] for words in commands("terraform") if words[2] == "output"}
    named |= set(
        re.findall(r'[Oo]utput "(\w+)"', (ROOT / "infra/kuberay/overlays/gke/service-account.yaml").read_text())
    )
    assert named <= outputs


def test_names_on_google_cloud_are_terraforms() -> None:
    terraform = (MODULE / "cluster.tf").read_text()
    assert ["gcloud", "container", "clusters", "get-credentials", "actlake", "--region", "us-central1"] in list(
        commands()
    )
    assert re.search(r'resource "google_container_cluster" "main" \{\s+name\s+= "actlake"', terraform)
    assert 'repository_id = "actlake"' in terraform
    for words in commands("docker"):
        assert words[-1].startswith("us-central1-docker.pkg.dev/YOUR-PROJECT/actlake/actlake:")


@pytest.mark.slow
def test_gcloud_takes_its_commands() -> None:
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    lines = [shlex.join(words) for words in commands("gcloud")]
    assert [line for line in lines if not gcloud_takes(line)] == []
    assert not gcloud_takes("gcloud container clusters get-credentials actlake --regio us-central1")


def gcloud_takes(line: str) -> bool:
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (result,) = json.loads(done.stdout)
    return bool(result["success"])
