"""The file for Ray's cluster launcher is what Ray takes, and agrees with the Terraform module and the image."""

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "infra/ray/cluster-gcp.yaml"


def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def check(value: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(value)))


def test_ray_takes_it() -> None:
    check(config())


@pytest.mark.parametrize(
    "change", [{"max_worker": 3}, {"max_workers": -1}, {"docker": {"images": "x"}}, {"head_node_type": "heads"}]
)
def test_ray_would_refuse_another(change: dict[str, Any]) -> None:
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check(config() | change)


def test_every_machine_is_the_ingestions_account_without_a_public_address() -> None:
    value = config()
    assert value["provider"]["use_internal_ips"] is True
    for kind in value["available_node_types"].values():
        (account,) = kind["node_config"]["serviceAccounts"]
        assert account["email"] == "actlake-ingest@YOUR-PROJECT.iam.gserviceaccount.com"
        (network,) = kind["node_config"]["networkInterfaces"]
        assert "accessConfigs" not in network
        assert network["subnetwork"].endswith(f"regions/{value['provider']['region']}/subnetworks/actlake")


def test_gpus_are_on_spot_machines_and_the_head_runs_no_work() -> None:
    value = config()
    kinds = value["available_node_types"]
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert kinds[value["head_node_type"]]["resources"] == {"CPU": 0}
    (start,) = [line for line in value["head_start_ray_commands"] if line.startswith("ray start")]
    assert "--num-cpus=0" in start


def test_all_processes_ask_for_the_token() -> None:
    value = config()
    assert "--env RAY_AUTH_MODE=token" in value["docker"]["run_options"]
    (target,) = value["file_mounts"]
    home = re.search(r"useradd .*--home-dir (/\S+)", (ROOT / "infra/docker/Dockerfile").read_text())
    assert home is not None
    assert target == f"{home[1]}/.ray/auth_token"
