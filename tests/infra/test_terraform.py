"""The Terraform module: parsed and held against what it promises; each rule is shown to find a file that breaks it."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hcl2
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "infra/terraform/gcp"
FILES = {path.name: path.read_text() for path in sorted(MODULE.glob("*.tf"))}

_BUCKET_ROLES = {"roles/storage.objectUser", "roles/storage.objectViewer"}
_ACCOUNT_ROLES = {"roles/iam.workloadIdentityUser", "roles/iam.serviceAccountUser"}
_PROJECT_ROLES = {"roles/container.defaultNodeServiceAccount", "${google_project_iam_custom_role.launcher[0].id}"}
_REPOSITORY_ROLES = {"roles/artifactregistry.reader"}
_NEVER = ("allUsers", "allAuthenticatedUsers", "local-exec", "remote-exec")
#: What refers to nothing that is made before it, and so names what it waits for.
_BEFORE_ALL = {"google_service_account", "google_project_iam_custom_role", "google_compute_network"}
#: What may be granted on what; anything else that grants is refused.
_GRANTS = {
    "google_storage_bucket_iam_member": _BUCKET_ROLES,
    "google_service_account_iam_member": _ACCOUNT_ROLES,
    "google_project_iam_member": _PROJECT_ROLES,
    "google_artifact_registry_repository_iam_member": _REPOSITORY_ROLES,
}


def plain(value: Any) -> Any:
    """Return what python-hcl2 parsed without its marks: text without quotes, blocks without comments."""
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items() if not k.startswith("__")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.strip('"') if isinstance(value, str) else value


def parse(files: dict[str, str]) -> dict[str, list[Any]]:
    blocks: dict[str, list[Any]] = {}
    for text in files.values():
        for kind, found in plain(hcl2.loads(text)).items():
            blocks.setdefault(kind, []).extend(found)
    return blocks


def resources(blocks: dict[str, list[Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for block in blocks.get("resource", ()):
        for kind, named in block.items():
            for name, body in named.items():
                yield kind, name, body


def problems(files: dict[str, str]) -> list[str]:
    """What a module does that it must not, and lacks that it must have."""
    blocks, text = parse(files), "\n".join(files.values())
    found = [
        f"{word} appears" for word in ("allUsers", "allAuthenticatedUsers", "local-exec", "remote-exec") if word in text
    ]
    for kind, name, body in resources(blocks):
        where = f"{kind}.{name}"
        found += [f"{where}: {problem}" for problem in resource_problems(kind, body)]
    return [*found, *broken_references(blocks, text)]


def resource_problems(kind: str, body: dict[str, Any]) -> Iterator[str]:
    if kind in _BEFORE_ALL and body.get("depends_on") != ["${google_project_service.apis}"]:
        yield "does not wait for the APIs"
    if kind in _CHECKS:
        yield from _CHECKS[kind](body)
    elif "_iam_" in kind:
        if kind not in _GRANTS:
            yield "grants what is not looked at here, or takes others' grants away"
        elif body["role"] not in _GRANTS[kind]:
            yield f"role {body['role']}"
    elif kind in ("google_service_account_key", "google_storage_hmac_key"):
        yield "a key that can be lost"


def role_problems(body: dict[str, Any]) -> Iterator[str]:
    for permission in body["permissions"]:
        if not permission.startswith("compute.") or "*" in permission or "IamPolicy" in permission:
            yield f"permission {permission}"


def firewall_problems(body: dict[str, Any]) -> Iterator[str]:
    if "0.0.0.0/0" in body.get("source_ranges", ["0.0.0.0/0"]):
        yield "open to everyone"


def service_problems(body: dict[str, Any]) -> Iterator[str]:
    # Accounts and roles are of the first, grants on the project of the second.
    for name in ("iam.googleapis.com", "cloudresourcemanager.googleapis.com"):
        if f'"{name}"' not in body["for_each"]:
            yield f"{name} is not enabled"


def bucket_problems(body: dict[str, Any]) -> Iterator[str]:
    if body.get("uniform_bucket_level_access") is not True:
        yield "access is not uniform"
    if body.get("public_access_prevention") != "enforced":
        yield "may be made public"
    if body.get("force_destroy") is not False:
        yield "is destroyed with its data"
    if body.get("hierarchical_namespace") != [{"enabled": True}]:
        yield "has no folders"
    if body.get("soft_delete_policy") != [{"retention_duration_seconds": 0}]:
        yield "keeps deleted objects"
    rules = {rule["action"][0]["type"]: rule["condition"][0] for rule in body.get("lifecycle_rule", ())}
    if "AbortIncompleteMultipartUpload" not in rules:
        yield "keeps uploads that broke off"
    if "Delete" in rules:
        yield "deletes what no variable names"
    waves = [block["lifecycle_rule"] for block in body.get("dynamic", ()) if "lifecycle_rule" in block]
    if [wave["for_each"] for wave in waves] != ["${var.waves}"]:
        yield "has no waves"
    elif "matches_prefix" not in waves[0]["content"][0]["condition"][0]:
        yield "a wave is the whole bucket"


def cluster_problems(body: dict[str, Any]) -> Iterator[str]:
    if body.get("private_cluster_config") != [{"enable_private_nodes": True}]:
        yield "nodes have public addresses"
    if "workload_identity_config" not in body:
        yield "no workload identity"
    if "master_authorized_networks_config" not in body:
        yield "anyone reaches the control plane"
    if body.get("in_transit_encryption_config") != "IN_TRANSIT_ENCRYPTION_INTER_NODE_TRANSPARENT":
        yield "traffic between nodes is not encrypted"


def pool_problems(body: dict[str, Any]) -> Iterator[str]:
    (config,) = body["node_config"]
    if config.get("service_account") != "${google_service_account.nodes.email}":
        yield "nodes have the default identity"
    if config.get("workload_metadata_config") != [{"mode": "GKE_METADATA"}]:
        yield "pods see the node's identity"
    if "autoscaling" not in body:
        yield "does not scale"


_CHECKS = {
    "google_compute_firewall": firewall_problems,
    "google_container_cluster": cluster_problems,
    "google_container_node_pool": pool_problems,
    "google_project_iam_custom_role": role_problems,
    "google_project_service": service_problems,
    "google_storage_bucket": bucket_problems,
}


def broken_references(blocks: dict[str, list[Any]], text: str) -> Iterator[str]:
    variables = {name for block in blocks["variable"] for name in block}
    made = {f"{kind}.{name}" for kind, name, _ in resources(blocks)}
    for name in sorted(set(re.findall(r"\bvar\.(\w+)", text)) - variables):
        yield f"no variable {name}"
    for name in sorted(variables - set(re.findall(r"\bvar\.(\w+)", text))):
        yield f"variable {name} is not used"
    for name in sorted(set(re.findall(r"\b(google_\w+\.\w+)", text)) - made):
        yield f"no resource {name}"


def test_the_module_keeps_its_promises() -> None:
    assert problems(FILES) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("bucket.tf", "uniform_bucket_level_access = true", "uniform_bucket_level_access = false", "not uniform"),
        ("bucket.tf", '"enforced"', '"inherited"', "may be made public"),
        ("bucket.tf", "force_destroy = false", "force_destroy = true", "destroyed with its data"),
        ("bucket.tf", "enabled = true", "enabled = false", "no folders"),
        ("bucket.tf", "retention_duration_seconds = 0", "retention_duration_seconds = 604800", "keeps deleted"),
        ("bucket.tf", "AbortIncompleteMultipartUpload", "Delete", "keeps uploads that broke off"),
        ("bucket.tf", "AbortIncompleteMultipartUpload", "Delete", "deletes what no variable names"),
        ("bucket.tf", "matches_prefix = [lifecycle_rule.key]", "", "the whole bucket"),
        ("iam.tf", "roles/storage.objectUser", "roles/storage.admin", "role roles/storage.admin"),
        ("iam.tf", "roles/container.defaultNodeServiceAccount", "roles/editor", "role roles/editor"),
        ("iam.tf", "google_storage_bucket_iam_member", "google_project_iam_member", "role roles/storage.objectUser"),
        ("iam.tf", "google_storage_bucket_iam_member", "google_storage_bucket_iam_policy", "not looked at here"),
        ("iam.tf", "depends_on = [google_project_service.apis]", "", "does not wait for the APIs"),
        ("network.tf", '"iam.googleapis.com",', "", "iam.googleapis.com is not enabled"),
        ("iam.tf", "each.value", '"allUsers"', "allUsers appears"),
        ("iam.tf", "compute.zones.get", "storage.objects.get", "permission storage.objects.get"),
        ("iam.tf", "compute.zones.get", "compute.instances.setIamPolicy", "permission compute.instances.setIamPolicy"),
        ("network.tf", '"35.235.240.0/20"', '"0.0.0.0/0"', "open to everyone"),
        ("cluster.tf", "enable_private_nodes = true", "enable_private_nodes = false", "public addresses"),
        ("cluster.tf", "master_authorized_networks_config", "master_auth", "anyone reaches"),
        (
            "cluster.tf",
            "IN_TRANSIT_ENCRYPTION_INTER_NODE_TRANSPARENT",
            "IN_TRANSIT_ENCRYPTION_DISABLED",
            "not encrypted",
        ),
        ("cluster.tf", '"GKE_METADATA"', '"GCE_METADATA"', "see the node's identity"),
        ("cluster.tf", "var.gpu_machine", "var.gpu_machin", "no variable gpu_machin"),
        ("iam.tf", "google_service_account.nodes.member", "google_service_account.node.member", "no resource"),
    ],
)
def test_a_module_that_breaks_one_would_be_found(file: str, old: str, new: str, problem: str) -> None:
    assert old in FILES[file]
    found = problems(FILES | {file: FILES[file].replace(old, new)})
    assert any(problem in line for line in found), found


def test_the_example_gives_every_variable_that_has_no_default() -> None:
    variables = {name: body for block in parse(FILES)["variable"] for name, body in block.items()}
    example = (MODULE / "terraform.tfvars.example").read_text()
    given = set(hcl2.loads(example)) - {"__comments__"}
    assert given == {name for name, body in variables.items() if "default" not in body}
    assert set(re.findall(r"^#? ?(\w+) +=", example, re.MULTILINE)) <= set(variables)


def test_variables_that_could_open_the_bucket_are_checked() -> None:
    variables = {name: body for block in parse(FILES)["variable"] for name, body in block.items()}
    for name in ("readers", "waves", "admin_ranges"):
        assert "validation" in variables[name]


def test_spot_machines_carry_the_gpus() -> None:
    assert re.search(r"gpu +=.*spot = true.*gpus = \[var\.gpu\]", FILES["cluster.tf"])
    assert re.search(r"system =.*spot = false", FILES["cluster.tf"])


def terraform(*words: str) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("terraform")
    if program is None:
        pytest.skip("terraform is not installed")
    return subprocess.run(
        [program, f"-chdir={MODULE}", *words], capture_output=True, text=True, timeout=120, check=False
    )


def test_terraform_formats_it_as_it_is() -> None:
    done = terraform("fmt", "-check", "-diff")
    assert (done.returncode, done.stdout) == (0, "")


def test_terraform_finds_it_valid() -> None:
    if not (MODULE / ".terraform").is_dir():
        pytest.skip("the provider is not here; 'terraform init' in infra/terraform/gcp downloads it")
    done = terraform("validate", "-no-color")
    assert done.returncode == 0, done.stdout + done.stderr
