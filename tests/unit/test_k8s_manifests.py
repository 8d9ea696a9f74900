"""k8s/: offline, against the published schemas of the core kinds and KubeRay's documented v1 fields."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from trainer.__main__ import parse, verb_parser
from trainer.cli import watch
from trainer.cli.sample import check_series
from trainer.config.io import load_config
from trainer.exit_codes import ExitCode

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
KUBERNETES = "1.31"
KUSTOMIZATIONS = ("base", "cluster", "overlays/a100", "overlays/kind-cpu")

# Names in ray.io/v1 (KubeRay 1.1 and later), by the type that has them.
RAY_JOB_SPEC = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "clusterSelector",
    "deletionPolicy",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "jobId",
    "managedBy",
    "metadata",
    "rayClusterSpec",
    "runtimeEnvYAML",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "submitterConfig",
    "submitterPodTemplate",
    "suspend",
    "ttlSecondsAfterFinished",
}
RAY_CLUSTER_SPEC = {
    "autoscalerOptions",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "headServiceAnnotations",
    "managedBy",
    "rayVersion",
    "suspend",
    "workerGroupSpecs",
}
AUTOSCALER = {
    "env",
    "envFrom",
    "idleTimeoutSeconds",
    "image",
    "imagePullPolicy",
    "resources",
    "securityContext",
    "upscalingMode",
    "volumeMounts",
}
HEAD_GROUP = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_GROUP = {
    "groupName",
    "idleTimeoutSeconds",
    "maxReplicas",
    "minReplicas",
    "numOfHosts",
    "rayStartParams",
    "replicas",
    "scaleStrategy",
    "suspend",
    "template",
}


def documents(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def rendered(name: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send."""
    for command in (["kubectl", "kustomize"], ["kustomize", "build"]):
        if shutil.which(command[0]):
            done = subprocess.run([*command, str(K8S / name)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return documents(done.stdout)
    pytest.skip("rendering needs kubectl or kustomize (https://kubectl.docs.kubernetes.io/installation)")


def plain_files() -> list[Path]:
    """Manifests that stand as they are, without kustomize."""
    skip = ("kustomization.yaml", "run.yaml", "node-pools.yaml")
    return [path for path in sorted(K8S.rglob("*.yaml")) if path.name not in skip]


def driver_of(job: dict[str, Any]) -> str:
    """The driver's command line, without what the entry point makes of its exit code."""
    command: str = job["spec"]["entrypoint"].partition(" || ")[0]
    return command


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"]["rayClusterSpec"] if document["kind"] == "RayJob" else document["spec"]


def groups(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = cluster_spec(document)
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


def check(document: dict[str, Any]) -> None:
    """Core kinds by schema; Ray kinds by their documented fields, their pods by schema again."""
    if not document["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert document["apiVersion"] == "ray.io/v1"
    assert set(document) <= {"apiVersion", "kind", "metadata", "spec"}
    if document["kind"] == "RayJob":
        assert set(document["spec"]) <= RAY_JOB_SPEC
    spec = cluster_spec(document)
    assert set(spec) <= RAY_CLUSTER_SPEC
    assert set(spec.get("autoscalerOptions", {})) <= AUTOSCALER
    for name, group in groups(document):
        assert set(group) <= (HEAD_GROUP if name == "head" else WORKER_GROUP), name
        assert {"template", "rayStartParams"} <= set(group), name
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), name
        if name != "head":
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, **group["template"]["metadata"]},
            "spec": group["template"]["spec"],
        }
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", plain_files(), ids=lambda path: str(path.relative_to(K8S)))
def test_files_follow_the_schemas(path: Path) -> None:
    found = documents(path.read_text(encoding="utf-8"))
    assert found
    for document in found:
        check(document)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_what_kustomize_renders_follows_the_schemas(name: str) -> None:
    found = rendered(name)
    kinds = [document["kind"] for document in found]
    assert kinds.count("RayJob") + kinds.count("RayCluster") == 1
    for document in found:
        check(document)
        if document["kind"] != "Namespace":
            assert document["metadata"]["namespace"] == "ldm"


def test_the_checker_itself_refuses_a_misspelt_field() -> None:
    (job,) = documents((K8S / "base" / "rayjob.yaml").read_text(encoding="utf-8"))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 1
    with pytest.raises(AssertionError):
        check(job)
    (account,) = documents((K8S / "base" / "service-account.yaml").read_text(encoding="utf-8"))
    with pytest.raises(kubernetes_validate.ValidationError):
        check({**account, "annotations": {}})


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_pods_are_unprivileged_share_memory_and_are_scraped(name: str) -> None:
    found = rendered(name)
    (ray,) = (document for document in found if document["kind"] in ("RayJob", "RayCluster"))
    maps = {document["metadata"]["name"] for document in found if document["kind"] == "ConfigMap"}
    budgets = [d["spec"]["selector"]["matchLabels"] for d in found if d["kind"] == "PodDisruptionBudget"]
    images = set()
    for group, spec in groups(ray):
        template = spec["template"]
        pod, (container,) = template["spec"], template["spec"]["containers"]
        images.add(container["image"])
        assert pod["securityContext"]["runAsNonRoot"], group
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, group
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, group
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounts["shm"] == "/dev/shm"
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory", group
        assert volumes["run-config"]["configMap"]["name"] in maps, group
        labels, annotations = template["metadata"]["labels"], template["metadata"]["annotations"]
        assert any(budget.items() <= labels.items() for budget in budgets), group
        port = annotations["prometheus.io/port"]
        assert annotations["prometheus.io/scrape"] == "true"
        assert spec["rayStartParams"]["metrics-export-port"] == port, group
        assert int(port) in [entry["containerPort"] for entry in container["ports"]], group
    assert len(images) == 1
    assert re.fullmatch(r"\S+:\d+\.\d+\.\d+", images.pop())


SPOT_NOTICE_S = 120
"""From a cloud's notice to the end of a spot node."""


def hook_of(pod: dict[str, Any]) -> str:
    (container,) = pod["containers"]
    command: list[str] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:2] == ["bash", "-c"]
    subprocess.run(["bash", "-n", "-c", command[2]], check=True)
    return command[2]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_a_pod_that_is_to_go_has_the_time_that_the_documents_promise_for_a_save(name: str) -> None:
    (ray,) = (document for document in rendered(name) if document["kind"] in ("RayJob", "RayCluster"))
    told = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    for group, spec in groups(ray):
        pod = spec["template"]["spec"]
        grace, hook = pod["terminationGracePeriodSeconds"], hook_of(pod)
        if group == "head":
            (seconds,) = re.findall(r"\{1\.\.(\d+)\}", hook)
            assert int(seconds) < grace, "the driver may still save when the pod is killed"
            continue
        (waited,) = re.findall(r"sleep (\d+)", hook)
        (deadline,) = re.findall(r"--deadline-remaining-seconds (\d+)", hook)
        # Saved before Ray gives the node up, and Ray gone before Kubernetes kills what is left.
        assert int(waited) < int(deadline) < grace, group
        if "spot" in group:
            assert grace < SPOT_NOTICE_S
        assert f"| {waited} s |" in told, "the table of docs/reliability.md, Preemption and stopping"


def test_the_heads_hook_finds_the_driver_and_not_the_shells_around_it() -> None:
    (ray,) = (document for document in rendered("base") if document["kind"] == "RayJob")
    head = dict(groups(ray))["head"]["template"]["spec"]
    (pattern,) = re.findall(r"driver='([^']+)'", hook_of(head))
    command = driver_of(ray)
    for driver in (command, f"/usr/local/bin/{command}", command.replace("python", "python3.11")):
        assert re.search(pattern, driver), driver
    for other in (
        f"/bin/sh -c {command}",
        f"bash -c {hook_of(head)}",
        "ray::JobSupervisor",
        "python -m trainer train",
    ):
        assert not re.search(pattern, other), other
    stop = yaml.safe_load(ray["spec"]["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    told = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"| {stop} s |" in told


TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def started_pod(document: dict[str, Any], group: str, spec: dict[str, Any]) -> dict[str, Any]:
    """The pod that KubeRay makes of a group: with what it puts beside our containers.

    As in ray-operator/controllers/ray/common/pod.go of v1.3.2: the autoscaler on the head has of
    autoscalerOptions its resources, image, environment, mounts and securityContext, and nothing else; workers
    wait for the head in an init container with the securityContext of the ray container.
    """
    pod = copy.deepcopy(spec["template"]["spec"])
    own = pod["containers"][0]
    options = cluster_spec(document).get("autoscalerOptions", {})
    if group != "head":
        pod["initContainers"] = [{"name": "wait-gcs-ready", "securityContext": own["securityContext"]}]
    elif cluster_spec(document).get("enableInTreeAutoscaling"):
        kept = {name: options[name] for name in ("volumeMounts", "securityContext") if name in options}
        pod["containers"].append({"name": "autoscaler", **kept})
    return pod


def breaches(pod: dict[str, Any]) -> list[str]:
    """What the pod-security standard `restricted` (Kubernetes 1.31) would refuse about a pod."""
    whole = pod.get("securityContext", {})
    found = [f"host {name}" for name in ("hostNetwork", "hostPID", "hostIPC") if pod.get(name)]
    for volume in pod.get("volumes", []):
        found += [f"volume {volume['name']}: {kind}" for kind in set(volume) - {"name"} - RESTRICTED_VOLUMES]
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        context, name = container.get("securityContext", {}), container["name"]
        if context.get("allowPrivilegeEscalation") is not False:
            found.append(f"{name}: allowPrivilegeEscalation")
        capabilities = context.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"] or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            found.append(f"{name}: capabilities")
        if (
            context.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True
            or context.get("runAsUser") == 0
        ):
            found.append(f"{name}: runAsNonRoot")
        profile = context.get("seccompProfile", whole.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            found.append(f"{name}: seccompProfile")
    return found


def token_files(pod: dict[str, Any], container: dict[str, Any]) -> set[str]:
    """What a container finds where Ray's autoscaler looks for its token; {"automounted"} where Kubernetes
    adds it."""
    mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
    if TOKEN_FOLDER not in mounts:
        return {"automounted"} if pod.get("automountServiceAccountToken", True) else set()
    (volume,) = (v for v in pod["volumes"] if v["name"] == mounts[TOKEN_FOLDER])
    files = set()
    for source in volume["projected"]["sources"]:
        files |= {source["serviceAccountToken"]["path"]} if "serviceAccountToken" in source else set()
        for kind in ("configMap", "downwardAPI"):
            files |= {item["path"] for item in source.get(kind, {}).get("items", [])}
    return files


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_namespace_admits_every_pod_with_what_kuberay_puts_into_it(name: str) -> None:
    found = rendered(name)
    (space,) = (document for document in found if document["kind"] == "Namespace")
    assert space["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    (ray,) = (document for document in found if document["kind"] in ("RayJob", "RayCluster"))
    for group, spec in groups(ray):
        assert breaches(started_pod(ray, group, spec)) == [], group


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_the_autoscaler_alone_has_a_token(name: str) -> None:
    (ray,) = (document for document in rendered(name) if document["kind"] in ("RayJob", "RayCluster"))
    scaled = bool(cluster_spec(ray).get("enableInTreeAutoscaling"))
    assert scaled == (name in ("cluster", "overlays/a100"))
    tokens = {}
    for group, spec in groups(ray):
        pod = started_pod(ray, group, spec)
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            tokens[group, container["name"]] = token_files(pod, container)
    holders = {place: files for place, files in tokens.items() if files}
    assert holders == ({("head", "autoscaler"): {"token", "ca.crt", "namespace"}} if scaled else {})


def test_the_judge_of_pods_finds_a_bare_autoscaler() -> None:
    (cluster,) = documents((K8S / "cluster" / "raycluster.yaml").read_text(encoding="utf-8"))
    del cluster["spec"]["autoscalerOptions"]
    pod = started_pod(cluster, "head", cluster["spec"]["headGroupSpec"])
    assert breaches(pod) == ["autoscaler: allowPrivilegeEscalation", "autoscaler: capabilities"]
    assert token_files(pod, pod["containers"][1]) == set()
    pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}})
    assert "volume host: hostPath" in breaches(pod)


@pytest.mark.parametrize("name", ["base", "overlays/a100", "overlays/kind-cpu"])
def test_the_entry_point_is_a_command_that_exists(name: str) -> None:
    pytest.importorskip("ray", reason='pip install "ray[default,train]"')
    from trainer.launch.ray import _parser

    found = rendered(name)
    (job,) = (document for document in found if document["kind"] == "RayJob")
    words = shlex.split(driver_of(job))
    assert words[:3] == ["python", "-m", "trainer.launch.ray"]
    args = _parser().parse_intermixed_args(words[3:])
    path = str(K8S / "base" / "run.yaml") if args.config.startswith("/etc/ldm/") else args.config
    config = load_config(path if Path(path).is_absolute() else str(REPOSITORY / path), args.overrides)
    fewest, most = map(int, args.workers.split(":"))
    config.sharing(fewest)
    config.sharing(most)
    places = [group.get("maxReplicas", 0) for _, group in groups(job)]
    gpus = 8 if name.endswith("a100") else 1
    assert sum(places) * gpus >= most


@pytest.mark.parametrize("name", ["base", "overlays/a100", "overlays/kind-cpu"])
@pytest.mark.parametrize(("code", "told"), [(0, 0), (2, 2), (75, 75), (76, 76), (77, 0), (78, 78)])
def test_a_run_that_was_stopped_is_not_started_again(name: str, code: int, told: int, tmp_path: Path) -> None:
    """KubeRay starts a new cluster for any command that fails; Ray has a shell run it."""
    driver = tmp_path / "python"
    driver.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
    driver.chmod(0o700)
    (job,) = (document for document in rendered(name) if document["kind"] == "RayJob")
    found = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(job["spec"]["entrypoint"], shell=True, env=found).returncode == told


def test_ray_version_is_the_pinned_one() -> None:
    pins = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^ray==(\S+)$", pins, re.MULTILINE)
    for path in (K8S / "base" / "rayjob.yaml", K8S / "cluster" / "raycluster.yaml"):
        (document,) = documents(path.read_text(encoding="utf-8"))
        assert cluster_spec(document)["rayVersion"] == pinned


def test_the_image_installs_only_pinned_versions_and_is_not_root() -> None:
    text = (K8S / "Dockerfile").read_text(encoding="utf-8")
    installs = [line for line in text.replace("\\\n", " ").splitlines() if "pip install" in line]
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
    (extras,) = re.findall(r"[\"']\.\[([\w,]+)\][\"']", text)
    assert {"ray", "evaluation", "lora"} <= set(extras.split(",")), "all that a pod's commands import"
    offered = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", constraints, re.MULTILINE)}
    for extra in extras.split(","):
        wanted = {canonicalize_name(Requirement(r).name) for r in offered["optional-dependencies"][extra]}
        assert wanted <= pins
    users = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert users
    assert all(int(user) > 0 for user in users)
    for source in re.findall(r"^COPY ([^\n]+)$", text, re.MULTILINE):
        for name in source.split()[:-1]:
            assert (REPOSITORY / name).exists(), name


def test_the_example_secret_holds_no_secret() -> None:
    (secret,) = documents((K8S / "secret.example.yaml").read_text(encoding="utf-8"))
    assert set(secret["stringData"].values()) == {""}


def admitted_command(folder: str) -> tuple[dict[str, Any], list[str]]:
    """A Job of k8s/ that stands alone, in a pod that is admitted, and its words."""
    (job,) = documents((K8S / folder / "job.yaml").read_text(encoding="utf-8"))
    pod = job["spec"]["template"]["spec"]
    assert breaches(pod) == []
    rules = job["spec"]["podFailurePolicy"]["rules"]
    fatal = next(rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob")
    assert fatal == [ExitCode.USER_ERROR, ExitCode.FATAL], "neither is cured by another start"
    (account,) = documents((K8S / "base" / "service-account.yaml").read_text(encoding="utf-8"))
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    words = pod["containers"][0]["command"]
    assert words[:3] == ["python", "-m", "trainer"]
    return job["spec"], words[3:]


def test_the_evaluator_is_a_command_that_exists() -> None:
    _, (verb, *words) = admitted_command("evaluator")
    assert verb == "evaluate"
    args = verb_parser(verb).parse_args(words)
    check_series(watch._drawing(args, args.source, "out"))
    assert args.features is None, "then Inception's, whose weights no image has"
    assert args.inception_weights


def test_the_encoders_are_commands_that_exist_and_share_all_of_the_work() -> None:
    spec, (verb, *words) = admitted_command("encoder")
    assert (verb, spec["completionMode"]) == ("encode", "Indexed")
    for part in range(spec["completions"]):
        said = [word.replace("$(JOB_COMPLETION_INDEX)", str(part)) for word in words]
        args = parse(verb_parser(verb), said)
        assert (args.rank, args.ranks) == (part, spec["completions"])
    config = load_config(str(REPOSITORY / args.config), args.overrides)
    assert config.first_stage.cache
    config.sharing(args.ranks)


def test_the_samplers_are_commands_that_exist_and_make_the_whole_set() -> None:
    spec, (verb, *words) = admitted_command("sampler")
    assert (verb, spec["completionMode"]) == ("sample", "Indexed")
    for share in range(spec["completions"]):
        said = [word.replace("$(JOB_COMPLETION_INDEX)", str(share)) for word in words]
        args = parse(verb_parser(verb), said)
        check_series(args)
        assert args.share == f"{share}/{spec['completions']}"
