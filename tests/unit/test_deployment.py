"""The deployment files in `cluster/`, as far as they can be held against something without a cluster: KubeRay's and Kubernetes' schemas,
Ray's own validation and EC2's, this project's own settings, and each other. How they run: `tests/integration/test_deployment.py`."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator
from ray.scripts.scripts import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from pipelines.job import load
from pipelines.stop import END_S

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = REPOSITORY / "cluster"
RAYJOB = CLUSTER / "kuberay" / "rayjob" / "rayjob.yaml"
RAYCLUSTER = CLUSTER / "kuberay" / "raycluster.yaml"
OVERLAY = CLUSTER / "kuberay" / "kueue"
SCHEMA = json.loads((REPOSITORY / "tests" / "data" / "kuberay_schema.json").read_text())
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CLOUDS = ["aws", "gcp"]
TYPES = {"ConfigMap": "io.k8s.api.core.v1.ConfigMap", "RayJob": "RayJob", "RayCluster": "RayCluster"}

Document = dict[str, Any]


def documents(path: Path) -> dict[str, Document]:
    """The documents of a YAML file by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all(path.read_text())}


def problems(document: Document) -> list[str]:
    """What the API server of a cluster with KubeRay would refuse of a document, fields that it does not know among it."""
    validator = jsonschema.Draft7Validator({"$ref": f"#/$defs/{TYPES[document['kind']]}", "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def cluster_specs() -> Iterator[tuple[str, Document]]:
    """Every specification of a Ray cluster."""
    yield "rayjob.yaml", documents(RAYJOB)["RayJob"]["spec"]["rayClusterSpec"]
    yield "raycluster.yaml", documents(RAYCLUSTER)["RayCluster"]["spec"]
    yield "kueue", overlay()["RayJob"]["spec"]["rayClusterSpec"]


def groups(spec: Document) -> list[Document]:
    """The pod templates of a cluster's head and workers."""
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: Document) -> Document:
    """The only container of a group's pods."""
    (only,) = group["template"]["spec"]["containers"]
    return dict(only)


def overlay() -> dict[str, Document]:
    """The documents of the job with the patches of the overlay, applied here: what `kubectl kustomize` gives."""
    kustomization = yaml.safe_load((OVERLAY / "kustomization.yaml").read_text())
    (base,) = kustomization["resources"]
    assert (OVERLAY / base).resolve() == RAYJOB.parent
    assert yaml.safe_load((RAYJOB.parent / "kustomization.yaml").read_text())["resources"] == [RAYJOB.name]
    found = documents(RAYJOB)
    for patch in kustomization["patches"]:
        target = found[patch["target"]["kind"]]
        assert patch["target"]["name"] == target["metadata"]["name"]
        for step in yaml.safe_load(patch["patch"]):
            *path, last = step["path"].strip("/").replace("~1", "/").split("/")
            place: Any = target
            for name in path:
                place = place[int(name) if isinstance(place, list) else name]
            key = int(last) if isinstance(place, list) else last
            if step["op"] == "remove":
                del place[key]
            else:
                assert step["op"] in ("add", "replace")
                assert (step["op"] == "add") != (isinstance(place, list) or key in place), f"{step}: not so in the base"
                place[key] = step["value"]
    return found


# KubeRay


@pytest.mark.parametrize("path", [RAYJOB, RAYCLUSTER], ids=lambda path: path.name)
def test_kuberay_knows_every_field(path: Path) -> None:
    for document in documents(path).values():
        assert problems(document) == []


WORKERS = "spec.rayClusterSpec.workerGroupSpecs.0"
MISTAKES: list[tuple[str, Any]] = [
    ("entryPoint", "python"),
    ("spec.retries", 3),
    ("spec.backoffLimit", "3"),
    ("spec.activeDeadlineSeconds", 0),
    ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
    ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),  # values are texts
    (f"{WORKERS}.maxReplicas", None),
    (f"{WORKERS}.groupName", ...),
    (f"{WORKERS}.template", ...),
    (f"{WORKERS}.template.spec.tolerations", None),  # nothing behind the colon
    (f"{WORKERS}.template.spec.tolerations.0.efect", "NoSchedule"),
    (f"{WORKERS}.template.spec.terminationGracePeriodSecond", 30),
    (f"{WORKERS}.template.spec.containers.0.preStop", {}),  # belongs below `lifecycle`
    (f"{WORKERS}.template.spec.containers.0.resources.limit", {}),
    (f"{WORKERS}.template.spec.containers.0.env.0.valu", "x"),
]


@pytest.mark.parametrize(("path", "value"), MISTAKES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_schema_refuses_what_a_cluster_would(path: str, value: Any) -> None:
    job = documents(RAYJOB)["RayJob"]
    *names, last = path.split(".")
    place: Any = job
    for name in names:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    assert problems(job)


def test_the_job_runs_with_settings_that_exist(tmp_path: Path) -> None:
    found = documents(RAYJOB)
    spec = found["RayJob"]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]
    (mount,) = container(head)["volumeMounts"]
    (volume,) = head["template"]["spec"]["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    for name, text in found["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    python, script, *arguments = shlex.split(spec["entrypoint"])
    assert python == "python"
    assert script == "/app/pipelines/generate.py"
    config = load([argument.replace(mount["mountPath"], str(tmp_path)) for argument in arguments]).config
    assert config.output.startswith("s3://")  # what all pods share
    assert config.engine.device == "cuda"
    assert config.run.num_gpus == 1  # the cluster begins without GPUs, and only what is asked for makes it grow
    gpus = [
        int(container(group)["resources"]["limits"]["nvidia.com/gpu"]) * group["maxReplicas"]
        for group in spec["rayClusterSpec"]["workerGroupSpecs"]
    ]
    assert config.run.replicas == (1, sum(gpus))


def test_the_job_ends_and_is_tried_again() -> None:
    spec = documents(RAYJOB)["RayJob"]["spec"]
    assert spec["backoffLimit"] >= 1
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True  # else a time to live is refused, and Kueue takes no job
    assert spec["ttlSecondsAfterFinished"] > 0
    assert "clusterSelector" not in spec


@pytest.mark.parametrize(
    ("name", "spec"), list(cluster_specs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_cluster_is_safe_and_its_nodes_may_go(name: str, spec: Document) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    head, *workers = groups(spec)
    assert head["serviceType"] == "ClusterIP"
    assert "enableIngress" not in head
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert {container(group)["image"] for group in groups(spec)} == {f"nano-vllm-ray:{PROJECT['version']}"}
    for group in groups(spec):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        shell, flag, script = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert (shell, flag) == ("/bin/sh", "-c")
        commands = [shlex.split(each) for each in script.split(";")]
        for words in commands:
            if words[0] == "ray":
                cli.commands[words[1]].make_context(words[1], words[2:])  # exits where an option is not known
        waits = [float(number) for number in re.findall(r"(?:pre_stop|sleep|--grace-period) (\d+)", script)]
        starts = 3.0 * sum(words[0] in ("ray", "python") for words in commands)
        assert sum(waits) + starts < pod["terminationGracePeriodSeconds"]
        assert commands[-1][:2] == ["ray", "stop"]
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
    # The driver is on the head: what stops it must leave it the time that it needs, `ray job stop` included.
    stop = re.search(
        r"python -m cluster.pre_stop (\d+)", container(head)["lifecycle"]["preStop"]["exec"]["command"][-1]
    )
    assert stop
    patience = {each["name"]: each.get("value") for each in container(head)["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert END_S < int(str(patience)) < int(stop[1])
    for group in workers:
        pod = group["template"]["spec"]
        assert container(group)["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
        assert pod["nodeSelector"]
        names = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container(group)["volumeMounts"]} == names


def test_a_cluster_grows_from_nothing_and_prefers_spot() -> None:
    for spec in (documents(RAYJOB)["RayJob"]["spec"]["rayClusterSpec"], documents(RAYCLUSTER)["RayCluster"]["spec"]):
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["autoscalerOptions"]["version"] == "v2"
        spot, demand = spec["workerGroupSpecs"]
        for group in (spot, demand):
            assert group["replicas"] == group["minReplicas"] == 0
            assert group["maxReplicas"] > 0
        assert spot["priority"] > demand["priority"]
        labels = {  # of nodes on spot: value by name
            condition["key"]: condition["values"]
            for term in affinity(spot)
            for condition in term["matchExpressions"]
            if condition["operator"] == "In"
        }
        (term,) = affinity(spec["headGroupSpec"])
        assert {
            each["key"]: each["values"] for each in term["matchExpressions"] if each["operator"] == "NotIn"
        } == labels
        assert len(affinity(spot)) == len(labels)  # terms are alternatives
        assert "affinity" not in demand["template"]["spec"]


def affinity(group: Document) -> list[Document]:
    """What a group's nodes must be."""
    node = group["template"]["spec"]["affinity"]["nodeAffinity"]
    return list(node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"])


def test_the_two_clusters_are_one() -> None:
    of_job = documents(RAYJOB)["RayJob"]["spec"]["rayClusterSpec"]
    head = of_job["headGroupSpec"]["template"]["spec"]
    del head["volumes"], head["containers"][0]["volumeMounts"]  # the job's settings
    assert documents(RAYCLUSTER)["RayCluster"]["spec"] == of_job


def test_kueue_gets_a_gang() -> None:
    found = overlay()
    for document in found.values():
        assert problems(document) == []
    queues = documents(OVERLAY / "queues.yaml")
    job = found["RayJob"]
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": queues["LocalQueue"]["metadata"]["name"]}
    assert queues["LocalQueue"]["spec"]["clusterQueue"] == queues["ClusterQueue"]["metadata"]["name"]
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 1
    (resources,) = queues["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = resources["flavors"]
    assert flavor["name"] == queues["ResourceFlavor"]["metadata"]["name"]
    quota = {each["name"]: quantity(each["nominalQuota"]) for each in flavor["resources"]}
    assert set(quota) == set(resources["coveredResources"])
    for name, most in quota.items():
        each = [quantity(container(one)["resources"]["requests"].get(name, 0)) for one in groups(spec)]
        assert each[0] + each[1] * group["replicas"] <= most, f"the quota of {name} never admits the job"


def quantity(value: str | int) -> float:
    """A quantity of Kubernetes as a number."""
    text = str(value)
    return float(text.removesuffix("Gi")) * 2**30 if text.endswith("Gi") else float(text)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_overlay_is_what_kubectl_makes_of_it() -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(OVERLAY)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {each["kind"]: each for each in yaml.safe_load_all(done.stdout)} == overlay()


# `ray up`


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_the_cloud_file(cloud: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    types = config["available_node_types"]
    head = types[config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    workers = {name: each for name, each in types.items() if name != config["head_node_type"]}
    assert sum(each["max_workers"] for each in workers.values()) == config["max_workers"]
    for each in workers.values():
        assert each["min_workers"] == 0
        assert each["resources"]["GPU"] == 1
    by_priority = sorted(workers, key=lambda name: -workers[name]["priority"])
    assert [is_spot(workers[name]["node_config"]) for name in by_priority] == [True, False]
    assert not is_spot(head["node_config"])


def is_spot(node: Document) -> bool:
    """Whether a node may be taken away."""
    market = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return market or node.get("scheduling", {}).get("provisioningModel") == "SPOT"


def test_ec2_knows_every_field_of_a_node() -> None:
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    config = yaml.safe_load((CLUSTER / "aws.yaml").read_text())
    for each in config["available_node_types"].values():
        request = {**each["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, model.input_shape).has_errors()
        assert ParamValidator().validate({**request, "MarketType": "spot"}, model.input_shape).has_errors()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_of_a_cloud_get_the_package_and_the_token(cloud: str) -> None:
    config = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    mounts = config["file_mounts"]
    (checkout,) = (remote for remote, local in mounts.items() if local == ".")
    assert mounts["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    everything = "\n".join([*config["initialization_commands"], *config["setup_commands"]])
    assert f"pip install -q {checkout.replace('/home/ubuntu', '~')} " in everything
    assert "RAY_AUTH_MODE=token" in everything
    (start,) = (each for each in config["head_start_ray_commands"] if "--head" in each)
    assert "--dashboard-host=127.0.0.1" in start
    patience = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", start)
    assert patience
    assert int(patience[1]) > END_S
    commands = [each for name, part in config.items() if name.endswith("_commands") for each in part]
    assert len(commands) >= 8
    for command in commands:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr


# Versions, image, README


def test_one_version_of_ray_everywhere() -> None:
    texts = {path.name: path.read_text() for path in [CLUSTER / "Dockerfile", *(CLUSTER / f"{c}.yaml" for c in CLOUDS)]}
    pins = {name: re.findall(r"ray\[data,default\]==([\d.]+)", text) for name, text in texts.items()}
    versions = {spec["rayVersion"] for _, spec in cluster_specs()}
    (version,) = versions
    assert pins == {name: [version] for name in texts}
    (needed,) = (each for each in PROJECT["dependencies"] if each.startswith("ray["))
    least = needed.partition(">=")[2]
    assert [int(part) for part in version.split(".")] >= [int(part) for part in least.split(".")]


def instructions() -> list[list[str]]:
    """The instructions of the Dockerfile: a word, and the rest."""
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps a file from the build."""
    keep = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        rule = line.removeprefix("!")
        if line and not line.startswith("#") and (rule == "*" or path == rule or path.startswith(f"{rule}/")):
            keep = line.startswith("!")
    return not keep


def test_the_image_can_be_built() -> None:
    known = {"FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "CMD"}
    assert {word for word, _ in instructions()} <= known
    (base,) = (rest for word, rest in instructions() if word == "FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", base)
    copied = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        assert (REPOSITORY / source).exists(), source
        assert not ignored(source), f".dockerignore leaves {source} out"
    for secret in (".git/config", ".venv/bin/python", "bench/results", "demo_output/_run"):
        assert ignored(secret)
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {package.split(".")[0] for package in packages} <= set(copied)
    assert {PROJECT["readme"], PROJECT["license"]["file"], "pyproject.toml"} <= set(copied)
    for word, rest in instructions():
        if word == "RUN":
            checked = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stderr
    last_user = [rest for word, rest in instructions() if word == "USER"]
    assert last_user == ["ray"]
    (workdir,) = (rest for word, rest in instructions() if word == "WORKDIR")
    assert documents(RAYJOB)["RayJob"]["spec"]["entrypoint"].split()[1].startswith(f"{workdir}/pipelines/")
    command = json.loads(instructions()[-1][1])
    assert (REPOSITORY / command[1]).exists()


def test_the_script_for_slurm_is_bash() -> None:
    checked = subprocess.run(["bash", "-n", CLUSTER / "slurm.sh"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    directives = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (CLUSTER / "slurm.sh").read_text(), re.MULTILINE)
    found = dict(directives)
    assert found["ntasks-per-node"] == "1"  # one raylet a node
    assert float(found["signal"].removeprefix("B:USR1@")) > 60 + END_S  # Slurm may be a minute late
    assert "requeue" in found


def test_files_named_in_the_readme_exist() -> None:
    text = re.sub(r"https?://\S+", "", (CLUSTER / "README.md").read_text())
    named = set(re.findall(r"\bcluster/[\w./-]+\w", text))
    assert named >= {"cluster/kuberay/rayjob/rayjob.yaml", "cluster/aws.yaml", "cluster/gcp.yaml", "cluster/slurm.sh"}
    for name in named:
        assert (REPOSITORY / name).exists(), name
    links = re.findall(r"\]\(([\w./-]+)\)", text)
    assert links
    for target in links:
        assert (CLUSTER / target).exists(), target


def test_commands_in_the_readme_are_real() -> None:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"(?:pipelines/generate\.py|cluster/slurm\.sh) +(--[^\n#]*)", text)
    assert len(commands) >= 4
    for arguments in commands:
        config = load(shlex.split(arguments)).config
        assert config.model
    settings = set(re.findall(r"`((?:run|engine|sampling)\.\w+)(?:=[^`]*)?`", text))
    assert len(settings) >= 5
    reference = (REPOSITORY / "pipelines" / "REFERENCE.md").read_text()
    for name in settings:
        assert f"| `{name}` |" in reference, name


def test_the_user_secret_is_not_that_of_kuberay() -> None:
    # KubeRay keeps the token of a cluster in a secret of the cluster's name.
    for name, spec in cluster_specs():
        secrets = {each["secretRef"]["name"] for group in groups(spec) for each in container(group)["envFrom"]}
        assert secrets == {"nano-vllm-store"}, name
    assert documents(RAYCLUSTER)["RayCluster"]["metadata"]["name"] == "nano-vllm"
    assert "secret generic nano-vllm-store" in (CLUSTER / "README.md").read_text()
