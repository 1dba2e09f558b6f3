"""The manifests: they build, are what KubeRay's schemas say to the last field, and run commands that we have."""

import copy
import functools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from actlake.jobs.cli import cluster, demo, ingest, query, report, sql, stats, verify  # noqa: F401 - each registers
from actlake.jobs.cli.app import app
from actlake.jobs.jobfile import RunOptions, WorkerRange, parse_job

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "infra/kuberay"
SCHEMAS = ROOT.parent / "shared/kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def build(overlay: str) -> list[dict[str, Any]]:
    """Return the manifests of an overlay, as kubectl builds them."""
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if kubectl is None and kustomize is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    command = [kubectl, "kustomize"] if kubectl else [str(kustomize), "build"]
    done = subprocess.run(
        [*command, str(KUBERAY / "overlays" / overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def one(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return copy.deepcopy(found)


def base() -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((KUBERAY / "base/cluster.yaml").read_text())
    return manifest


def strict(schema: Any) -> Any:
    """Return an OpenAPI v3 schema as JSON schema that refuses fields which it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def validator(kind: str) -> jsonschema.Draft7Validator:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not beside the checkout: no {path.name}")
    versions = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    made = strict(schema)
    # The API server knows what an object's metadata are.
    made["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft7Validator(made)


def violations(manifest: dict[str, Any]) -> list[str]:
    errors = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in errors]


# --- schemas ------------------------------------------------------------------------------------------------------


def test_the_cluster_is_what_kuberay_takes() -> None:
    assert violations(base()) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spec", "headGroupSpecs"), {}),
        (("spec", "workerGroupSpecs", 1, "maxReplica"), 3),
        (("spec", "workerGroupSpecs", 1, "minReplicas"), "two"),
        (("spec", "headGroupSpec", "template", "spec", "container"), []),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "imagePolicy"), "Always"),
        (("spec", "authOptions", "mode"), "off"),
    ],
)
def test_a_wrong_field_would_be_refused(place: tuple[Any, ...], value: Any) -> None:
    manifest = copy.deepcopy(base())
    *path, last = place
    functools.reduce(lambda inner, key: inner[key], path, manifest)[last] = value
    assert violations(manifest) != []


@every_overlay
def test_what_an_overlay_builds_is_what_kuberay_takes(overlay: str) -> None:
    kinds = [manifest["kind"] for manifest in build(overlay)]
    ray = ["RayJob"] if overlay.endswith("-job") else ["RayCluster"]
    assert [kind for kind in kinds if kind.startswith("Ray")] == ray
    assert {"Namespace", "NetworkPolicy", "ServiceAccount"} <= set(kinds)
    assert violations(one(build(overlay), ray[0])) == []


@every_overlay
def test_all_that_has_a_namespace_is_in_one(overlay: str) -> None:
    named = {m["metadata"].get("namespace") for m in build(overlay) if m["kind"] != "Namespace"}
    assert named == {"actlake"}


# --- what runs ----------------------------------------------------------------------------------------------------


def parse_command(words: list[str]) -> None:
    """Parse an actlake command line without running it."""
    assert words[0] == "actlake", f"another program: {words}"
    group: Any = typer.main.get_command(app)
    assert words[1] in group.commands, f"no command {words[1]!r}"
    group.commands[words[1]].make_context(words[1], words[2:])


def command_lines() -> Iterator[tuple[str, list[str]]]:
    for path in sorted(KUBERAY.rglob("*.yaml")):
        for manifest in yaml.safe_load_all(path.read_text()):
            for entrypoint in entrypoints(manifest):
                yield str(path.relative_to(KUBERAY)), shlex.split(entrypoint)


def entrypoints(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("entrypoint"), str):
            yield value["entrypoint"]
        if isinstance(value.get("command"), list):
            yield shlex.join([*value["command"], *value.get("args", [])])
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from entrypoints(item)


def test_every_command_line_is_one_of_ours() -> None:
    found = list(command_lines())
    assert ("job/job.yaml", ["actlake", "ingest", "/etc/actlake/job.toml", "--address", "auto"]) in found
    for _, words in found:
        parse_command(words)


@pytest.mark.parametrize("line", ["actlake ingest job.toml --addres auto", "actlake frobnicate x", "python x.py"])
def test_a_wrong_command_line_would_be_found(line: str) -> None:
    with pytest.raises((AssertionError, Exception), match=r"No such option|no command|another program"):
        parse_command(next(shlex.split(text) for text in entrypoints({"spec": {"entrypoint": line}})))


def test_the_job_file_parses_and_fits_the_pods() -> None:
    job = parse_job(tomllib.loads((KUBERAY / "job/job.toml").read_text()))
    gpu = base()["spec"]["workerGroupSpecs"][1]
    (container,) = gpu["template"]["spec"]["containers"]
    assert job.run.device == "cuda"
    # Workers beyond what nodes can be made for would wait for ever; no node is kept without a job.
    assert isinstance(job.run.workers, WorkerRange)
    assert job.run.workers.max <= gpu["maxReplicas"]
    assert gpu["replicas"] == gpu["minReplicas"] == 0
    assert job.run.start_timeout > RunOptions(workers=1).start_timeout
    assert job.run.threads is not None
    assert job.run.threads <= int(container["resources"]["limits"]["cpu"])
    gib = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert job.layout.shard_memory * 2 <= gib * 2**30


def test_the_job_file_is_where_the_entrypoint_reads_it() -> None:
    manifest = one(build("plain-job"), "RayJob")
    pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "job"]
    (volume,) = [v for v in pod["volumes"] if v["name"] == "job"]
    config = one(build("plain-job"), "ConfigMap")
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert f"{mount['mountPath']}/job.toml" in shlex.split(manifest["spec"]["entrypoint"])
    assert config["data"]["job.toml"] == (KUBERAY / "job/job.toml").read_text()


def test_ray_is_the_locked_one() -> None:
    (locked,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert base()["spec"]["rayVersion"] == locked


# --- security -----------------------------------------------------------------------------------------------------


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    spec = manifest["spec"]
    described = spec.get("rayClusterSpec", spec)
    yield described["headGroupSpec"]["template"]
    yield from (group["template"] for group in described["workerGroupSpecs"])
    if "submitterPodTemplate" in spec:
        yield spec["submitterPodTemplate"]


@every_overlay
def test_no_pod_is_root_or_may_become_more(overlay: str) -> None:
    manifest = one(build(overlay), "RayJob" if overlay.endswith("-job") else "RayCluster")
    for pod in pods(manifest):
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "actlake"
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            # Secrets come from Secrets.
            assert all("valueFrom" in env for env in container.get("env", ()) if "TOKEN" in env["name"])


@every_overlay
def test_strangers_reach_no_port(overlay: str) -> None:
    policy = one(build(overlay), "NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"app.kubernetes.io/part-of": "actlake"}
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        (source,) = rule["from"]
        assert source == {"podSelector": {}} or rule["ports"] == [{"protocol": "TCP", "port": 8265}]
    spec = one(build(overlay), "RayJob" if overlay.endswith("-job") else "RayCluster")["spec"]
    assert spec.get("rayClusterSpec", spec)["authOptions"] == {"mode": "token"}


@every_overlay
def test_every_image_is_replaced_and_pinned(overlay: str) -> None:
    manifest = one(build(overlay), "RayJob" if overlay.endswith("-job") else "RayCluster")
    images = {container["image"] for pod in pods(manifest) for container in pod["spec"]["containers"]}
    assert len(images) == 1
    assert re.fullmatch(r"\S+/actlake:\d+\.\d+\.\d+", images.pop())


# --- the overlay of Google Cloud and Terraform agree ---------------------------------------------------------------


def test_nodes_are_selected_by_the_names_of_terraforms_pools() -> None:
    terraform = (ROOT / "infra/terraform/gcp/cluster.tf").read_text()
    pools = set(re.findall(r"^    (\w+) += \{ machine", terraform, re.MULTILINE))
    selected = {pod["spec"]["nodeSelector"]["cloud.google.com/gke-nodepool"] for pod in pods(gke())}
    assert selected == {f"actlake-{pool}" for pool in pools}
    assert 'name               = "actlake-${each.key}"' in terraform


def test_pods_that_may_be_lost_tolerate_spot_and_the_head_does_not() -> None:
    head, *workers = pods(gke())
    assert "tolerations" not in head["spec"]
    for worker in workers:
        assert "actlake/spot" in {item["key"] for item in worker["spec"]["tolerations"]}


def test_the_service_account_is_terraforms() -> None:
    (account,) = re.findall(r'account_id   = "([\w-]+ingest)"', (ROOT / "infra/terraform/gcp/iam.tf").read_text())
    annotation = one(build("gke"), "ServiceAccount")["metadata"]["annotations"]["iam.gke.io/gcp-service-account"]
    assert annotation == f"{account}@YOUR-PROJECT.iam.gserviceaccount.com"


def gke() -> dict[str, Any]:
    return one(build("gke"), "RayCluster")
