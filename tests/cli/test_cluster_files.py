"""Would Ray and KubeRay take the cluster files and manifests as they stand? Asked of Ray's own code, and of the names in KubeRay's CRDs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import validate
from ray.autoscaler._private.util import prepare_config, validate_config

from ray_streamer.settings import Settings

ROOT = Path(__file__).parents[2]
CLUSTERS = ("cluster.yaml", "examples/cluster_gpu.yaml", "examples/cluster_local.yaml")
MANIFESTS = ("examples/kuberay_job.yaml", "examples/serve_llm.yaml")

# Names in helm-chart/kuberay-operator/crds/ray.io_rayjobs.yaml and ray.io_rayservices.yaml of ray-project/kuberay at feeaf72fa,
# which is 1.7.0-rc.0; files of more than a megabyte, most of which describes pods.
JOB = (
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus entrypointNumGpus "
    "entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes "
    "submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished"
)
SERVICE = (
    "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy rayClusterConfig rayClusterDeletionDelaySeconds "
    "serveConfigV2 serveService serviceUnhealthySecondThreshold suspend upgradeStrategy"
)
CLUSTER = (
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec headServiceAnnotations "
    "historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions upgradeStrategy workerGroupSpecs"
)
HEAD = "enableIngress headService ingressOptions labels rayStartParams resources serviceType template"
WORKERS = (
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts priority rayStartParams replicas resources "
    "scaleStrategy suspend template"
)
NEEDED_BY_WORKERS = {"groupName", "maxReplicas", "minReplicas", "template"}


def loaded(name):
    return list(yaml.safe_load_all((ROOT / name).read_text()))


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_files_follow_rays_schema_and_rays_own_checks(name):
    ray_folder = Path(importlib.util.find_spec("ray").origin).parent
    (cluster,) = loaded(name)
    validate(cluster, json.loads((ray_folder / "autoscaler" / "ray-schema.json").read_text()))
    prepared = prepare_config(cluster)
    validate_config(prepared)
    nodes = prepared["available_node_types"]
    assert prepared["head_node_type"] in nodes
    assert all(node["max_workers"] <= prepared["max_workers"] for node in nodes.values())
    assert all(node["min_workers"] <= node["max_workers"] for node in nodes.values())


def cluster_of(manifest):
    spec = manifest["spec"]
    return spec["rayClusterSpec" if manifest["kind"] == "RayJob" else "rayClusterConfig"]


def pods_of(manifest):
    cluster = cluster_of(manifest)
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_use_names_that_kuberay_knows(name):
    manifest = loaded(name)[-1]
    assert manifest["apiVersion"] == "ray.io/v1"
    names = {"RayJob": JOB, "RayService": SERVICE}[manifest["kind"]]
    cluster = cluster_of(manifest)
    assert manifest["spec"].keys() <= set(names.split())
    assert cluster.keys() <= set(CLUSTER.split())
    assert {"template"} <= cluster["headGroupSpec"].keys() <= set(HEAD.split())
    for workers in cluster["workerGroupSpecs"]:
        assert NEEDED_BY_WORKERS <= workers.keys() <= set(WORKERS.split())
        assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_have_the_account_the_memory_and_the_cache_that_they_name(name):
    *others, manifest = loaded(name)
    (account,) = [other for other in others if other["kind"] == "ServiceAccount"]
    for pod in pods_of(manifest):
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        (container,) = pod["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert mounts.keys() == volumes
        variables = {variable["name"]: variable["value"] for variable in container.get("env", [])}
        said = {variable.removeprefix("RAY_STREAMER_").lower(): value for variable, value in variables.items()}
        assert all(variable.startswith("RAY_STREAMER_") for variable in variables)
        settings = Settings.resolve(**said)
        if "cache_dir" in said:
            assert str(settings.cache_dir) in mounts.values()
        # As Kubernetes and this package write the same size.
        room = Settings.resolve(
            memory_limit=container["resources"]["limits"]["memory"].replace("Gi", "GiB")
        ).memory_limit
        assert room is not None
        assert (settings.node_memory_limit or 0) <= room // 2


def test_the_job_asks_for_as_many_ranks_as_there_are_gpus():
    job = loaded("examples/kuberay_job.yaml")[-1]
    *_, tp, device = job["spec"]["entrypoint"].split()
    gpus = [int(pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)) for pod in pods_of(job)]
    assert (sum(gpus), device) == (int(tp), "cuda")
