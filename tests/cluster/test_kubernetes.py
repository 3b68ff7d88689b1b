"""The manifests of launch/kubernetes are what Kubernetes, JobSet and Kubeflow Trainer know, and nothing in them runs as
root or is open to the outside. Rendered and checked offline."""

import json
import re
import subprocess
from functools import cache
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.cluster.tools import lacking, tool, tools_python
from tests.distributed.launch import ROOT

pytestmark = pytest.mark.cluster

FOLDER = ROOT / "launch" / "kubernetes"
VARIANTS = ["trainjob", "jobset", *(f"overlays/{name}" for name in ("trainjob-2x8", "jobset-2x8", "jobset-elastic"))]


@cache
def kubectl() -> str:
    path = tool("kubectl")
    version = subprocess.run([path, "version", "--client", "--output=json"], capture_output=True, text=True, check=True)
    version = json.loads(version.stdout)["clientVersion"]["gitVersion"]
    if [int(number) for number in re.findall(r"\d+", version)[:2]] < [1, 27]:
        lacking(f"kubectl {version} is older than 1.27: tests/cluster/install.sh installs a newer one")
    return path


def render(variant: str) -> str:
    command = [kubectl(), "kustomize", str(FOLDER / variant)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def manifests(variant: str) -> dict[str, Any]:
    """By kind."""
    return {manifest["kind"]: manifest for manifest in YAML(typ="safe").load_all(render(variant))}


def faults(text: str) -> list[str]:
    python = tools_python("kubernetes_validate", "kubeflow_trainer_api")
    command = [python, str(ROOT / "tests" / "cluster" / "validate_manifests.py")]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines() if done.returncode else []


def pods(manifest: Any) -> list[Any]:
    """All pod specifications in a manifest."""
    if isinstance(manifest, list):
        return [pod for item in manifest for pod in pods(item)]
    if not isinstance(manifest, dict):
        return []
    return [manifest] if "containers" in manifest else pods(list(manifest.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_is_known_and_valid(variant):
    assert faults(render(variant)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("numProcPerNode:", "numProcs:", "TrainJob.spec.trainer.numProcs: unknown"),
        ("maxRestarts:", "maxRestart:", "failurePolicy.maxRestart: unknown"),
        ("backoffLimit:", "backofLimit:", "backofLimit"),
        ("fsGroup: 1000", "fsGroup: none", "fsGroup"),
    ],
)
def test_a_mistake_would_be_seen(right, wrong, said):
    text = render("trainjob")
    assert right in text
    assert any(said in fault for fault in faults(text.replace(right, wrong)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_root_no_secret_no_open_port(variant):
    found = manifests(variant)
    assert found.keys().isdisjoint({"Secret", "Ingress", "ClusterRole", "ClusterTrainingRuntime"})
    assert found["Service"]["spec"]["type"] == "ClusterIP"
    specifications = pods(list(found.values()))
    assert len(specifications) == 2
    for pod in specifications:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is False
        assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            ports = [port["containerPort"] for port in container.get("ports", [])]
            assert ports == ([6006] if container["name"] == "tensorboard" else [])


def trainer(variant: str, kind: str) -> Any:
    (pod,) = pods(manifests(variant)[kind])
    return pod


def test_both_ways_run_the_same_pod():
    kubeflow, plain = trainer("trainjob", "TrainingRuntime"), trainer("jobset", "JobSet")
    for pod in (kubeflow, plain):
        assert pod["terminationGracePeriodSeconds"] > 120  # TORCH_ELASTIC_SHUTDOWN_TIMEOUT
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
        (container,) = pod["containers"]
        assert (ROOT / container["command"][1]).exists()
        assert (ROOT / container["args"][0]).exists()
        told = [variable["name"].removeprefix("PET_") for variable in container["env"][2:]]
        assert told == (
            [] if pod is kubeflow else ["NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"]
        )
        del container["env"][2:], container["resources"]
    assert kubeflow == plain


def test_the_overlays_change_nodes_and_gpus_everywhere():
    asked = manifests("overlays/trainjob-2x8")["TrainJob"]["spec"]["trainer"]
    assert (asked["numNodes"], asked["numProcPerNode"]) == (2, 8)
    assert asked["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    job = manifests("overlays/jobset-2x8")["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (job["completions"], job["parallelism"], variables["PET_NNODES"]) == (2, 2, "2")
    assert (container["resources"]["limits"]["nvidia.com/gpu"], variables["PET_NPROC_PER_NODE"]) == ("8", "8")


def test_the_elastic_overlay_replaces_a_lost_pod_alone():
    job = manifests("overlays/jobset-elastic")["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (job["completions"], job["parallelism"], variables["PET_NNODES"]) == (2, 2, "1:2")
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["Ignore"]
    assert job["backoffLimit"] > 0
