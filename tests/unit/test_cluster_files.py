"""The files of cluster/ are what the tools that read them take, and say the same as each other.

KubeRay's schema is in tests/support/schemas, Ray's in its wheel, those of EC2 and Compute Engine in
botocore and google-api-python-client. No file is ever given to a cloud here.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ("aws", "gcp")
IMAGES = {f"registry.example.com/raysft:{device}" for device in ("cpu", "gpu")}
WHERE = "import pathlib, ray.autoscaler as r; print(pathlib.Path(r.__file__).parent)"
PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


def loaded(name: str) -> dict[str, Any]:
    found = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def schema(kind: str) -> dict[str, Any]:
    path = ROOT / "tests" / "support" / "schemas" / "kuberay.json"
    whole = json.loads(path.read_text(encoding="utf-8"))
    return {**whole[kind], "$defs": whole["$defs"]}


def ray_cluster() -> dict[str, Any]:
    return loaded("kuberay/cluster.yaml")["spec"]


def groups() -> dict[str, Any]:
    return {group["groupName"]: group for group in ray_cluster()["workerGroupSpecs"]}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found is not None
    return found[1]


def texts(node: Any) -> Iterator[str]:
    """All strings of a tree."""
    if isinstance(node, dict):
        for value in node.values():
            yield from texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from texts(value)
    elif isinstance(node, str):
        yield node


# -- KubeRay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cluster", "job"])
def test_kuberay_takes_the_file(name: str) -> None:
    tree = loaded(f"kuberay/{name}.yaml")
    assert tree["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(schema(tree["kind"])).validate(tree)


def test_kubernetes_takes_the_claim() -> None:
    """By what the schema says of the claims that a pod may bring."""
    given = loaded("kuberay/storage.yaml")
    assert (given["apiVersion"], given["kind"]) == ("v1", "PersistentVolumeClaim")
    tree = loaded("kuberay/cluster.yaml")
    claim = {"spec": given["spec"]}
    volume = {"name": "any", "ephemeral": {"volumeClaimTemplate": claim}}
    tree["spec"]["headGroupSpec"]["template"]["spec"]["volumes"] = [volume]
    validator = jsonschema.Draft202012Validator(schema("RayCluster"))
    validator.validate(tree)
    claim["spec"] = {**given["spec"], "size": "1Ti"}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tree)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec", "workerGroupSpecs", 0, "minReplica"), 0),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "none"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "img"), "x"),
        (("spec", "authOptions", "mode"), "password"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "env", 0, "valu"), "1"),
    ],
)
def test_the_schema_refuses_what_kuberay_would(path: tuple[Any, ...], wrong: object) -> None:
    tree = copy.deepcopy(loaded("kuberay/cluster.yaml"))
    place: Any = tree
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema("RayCluster")).validate(tree)


def test_what_kuberay_checks_beside_its_schema() -> None:
    """Its controller refuses these: a policy of restarts under the autoscaler's version 2, a token
    before Ray 2.52, names of groups that are no DNS labels."""
    spec = ray_cluster()
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert "restartPolicy" not in group["template"]["spec"]
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in groups())
    assert spec["authOptions"] == {"mode": "token", "secretName": "raysft-token"}


def test_a_job_has_the_same_cluster_and_is_tried_again() -> None:
    job = loaded("kuberay/job.yaml")["spec"]
    assert job["rayClusterSpec"] == ray_cluster()
    assert job["backoffLimit"] >= 1  # of clusters: the same command continues the run
    assert job["shutdownAfterJobFinishes"] is True
    assert re.search(r"^raysft sft /shared/\S+ run\.storage_path=/shared/", job["entrypoint"])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "raysft" in scripts


def test_pools_on_kubernetes() -> None:
    found = groups()
    assert set(found) == {"data", "trainers"}
    for name, group in found.items():
        assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
        assert group["labels"] == {"pool": name}
        pod = group["template"]["spec"]
        (terms,) = pod["affinity"]["nodeAffinity"].values()
        keys = [one["key"] for t in terms["nodeSelectorTerms"] for one in t["matchExpressions"]]
        assert all("spot" in key or "capacity" in key or "priority" in key for key in keys)
        # The notice: the hook, within the time that the pod is given.
        command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "/opt/raysft/cluster/leave.py", "now"]
        assert float(command[-1]) < pod["terminationGracePeriodSeconds"]
    assert "nvidia.com/gpu" not in container(found["data"])["resources"]["limits"]
    assert int(container(found["trainers"])["resources"]["limits"]["nvidia.com/gpu"]) > 0


def test_all_pods_see_the_claim_in_one_place() -> None:
    claim = loaded("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    spec = ray_cluster()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container(group)["volumeMounts"] == [
            {"name": volume["name"], "mountPath": "/shared"}
        ]


# -- Ray's launcher ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_takes_the_file(name: str) -> None:
    """In a process of its own: ray reads its environment when it is imported."""
    script = (
        "import json, sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "made = prepare_config(yaml.safe_load(open(sys.argv[1])))\n"
        "validate_config(made)\n"
        "print(json.dumps(made))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(CLUSTER / f"{name}.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    kinds = made["available_node_types"]
    assert kinds["data"]["min_workers"] == kinds["trainers"]["min_workers"] == 0
    assert kinds["trainers"]["docker"]["worker_image"] == "registry.example.com/raysft:gpu"


def test_ray_refuses_a_key_that_it_does_not_know() -> None:
    path = Path(subprocess.check_output([sys.executable, "-c", WHERE], text=True).split()[-1])
    known = json.loads((path / "ray-schema.json").read_text(encoding="utf-8"))
    for name in LAUNCHED:
        tree = loaded(f"{name}.yaml")
        jsonschema.Draft7Validator(known).validate(tree)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(known).validate({**tree, "max_worker": 1})


@pytest.mark.parametrize("name", LAUNCHED)
def test_pools_in_a_cloud(name: str) -> None:
    tree = loaded(f"{name}.yaml")
    kinds = tree["available_node_types"]
    assert tree["head_node_type"] == "head" and set(kinds) == {"head", "data", "trainers"}
    assert {kind: has["labels"] for kind, has in kinds.items()} == {k: {"pool": k} for k in kinds}
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["trainers"]["resources"]["GPU"] > 0 and "GPU" not in kinds["data"]["resources"]
    for kind in ("data", "trainers"):
        assert kinds[kind]["min_workers"] == 0 < kinds[kind]["max_workers"]
        assert "spot" in json.dumps(kinds[kind]["node_config"]).lower()
    assert "spot" not in json.dumps(kinds["head"]["node_config"]).lower()
    notice = [line for line in tree["worker_start_ray_commands"] if "leave.py" in line]
    assert len(notice) == 1 and f"leave.py {name} --seconds" in notice[0]
    for line in (*tree["head_start_ray_commands"][1:], *tree["worker_start_ray_commands"][1:]):
        assert "RAY_AUTH_MODE=token" in line
    assert any(" /shared" in line for line in tree["initialization_commands"])
    assert "--volume /shared:/shared" in tree["docker"]["run_options"]


def test_ec2_takes_what_it_is_asked_for() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in loaded("aws.yaml")["available_node_types"].values():
        asked = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(asked, shape)
        assert not report.has_errors(), report.generate_report()
        for value, part in (("InstanceType", "InstanceType"), ("MarketType", "MarketType")):
            found = asked.get(value) or asked.get("InstanceMarketOptions", {}).get(value)
            known = shape.members["InstanceType"].enum
            if part == "MarketType":
                known = shape.members["InstanceMarketOptions"].members["MarketType"].enum
            assert found is None or found in known


def test_compute_engine_takes_what_it_is_asked_for() -> None:
    client = pytest.importorskip("googleapiclient")
    path = Path(client.__file__).parent / "discovery_cache" / "documents" / "compute.v1.json"
    known = json.loads(path.read_text(encoding="utf-8"))["schemas"]

    def check(value: object, shape: dict[str, Any], where: str) -> None:
        shape = known[shape["$ref"]] if "$ref" in shape else shape
        if shape.get("type") == "object" or "properties" in shape:
            assert isinstance(value, dict), where
            for key, one in value.items():
                assert key in shape["properties"], f"{where}.{key}"
                check(one, shape["properties"][key], f"{where}.{key}")
        elif shape.get("type") == "array":
            assert isinstance(value, list), where
            for one in value:
                check(one, shape["items"], where)
        elif shape.get("type") == "boolean":
            assert isinstance(value, bool), where
        elif "enum" in shape:
            assert value in shape["enum"], where

    for name, kind in loaded("gcp.yaml")["available_node_types"].items():
        check(kind["node_config"], known["Instance"], name)


# -- the image -----------------------------------------------------------------------------------


def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text(encoding="utf-8")


def test_a_linter_takes_the_dockerfile() -> None:
    beside = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint", path=beside) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (`make setup`)")
    done = subprocess.run([hadolint, str(CLUSTER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_installs_what_pyproject_says_and_nothing_from_elsewhere() -> None:
    text = dockerfile()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    (installed,) = re.findall(r"pip install .*", text)
    asked = re.search(r"'\.\[(.*)\]'$", installed)
    assert asked is not None and set(asked[1].split(",")) <= extras.keys()
    assert "-c /tmp/constraints.txt" in installed
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((ROOT / name).exists() for name in copied.split())
    for url in re.findall(r"https?://[^\s\"]+", text):
        assert url == "https://download.pytorch.org/whl/cpu"
    assert not re.search(r"^ADD |curl |git clone|wget http", text, re.M)
    (base,) = re.findall(r"^FROM (\S+)$", text, re.M)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    version = re.match(r"python:3\.(\d+)-slim", base)
    assert version is not None and 11 <= int(version[1]) < 13 and requires == ">=3.11,<3.13"


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
def test_each_device_has_its_torch(device: str, tmp_path: Path) -> None:
    """The shell of the Dockerfile, its pip replaced by one that says what it was asked for."""
    run = re.search(r"^RUN (case .*?'\.\[av\]')$", dockerfile(), re.M | re.S)
    assert run is not None
    shell = run[1].replace("\\\n", " ").replace("/tmp/", f"{tmp_path}/")
    shell = shell.replace("python -m pip install", "echo")
    done = subprocess.run(
        ["sh", "-c", shell],
        cwd=ROOT,
        env={"DEVICE": device, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    if device == "tpu":
        assert done.returncode == 1 and "DEVICE=tpu: cpu or gpu" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert ("whl/cpu" in done.stdout) == (device == "cpu")
    made = (tmp_path / "constraints.txt").read_text()
    assert f"\ntorch=={pinned('torch')}{'+cpu' if device == 'cpu' else ''}\n" in made
    assert made.replace("+cpu", "") == (ROOT / "constraints.txt").read_text()


# -- all of them ---------------------------------------------------------------------------------


def test_versions_and_images_agree() -> None:
    assert ray_cluster()["rayVersion"] == pinned("ray")
    said = {
        text
        for name in ("kuberay/cluster.yaml", "kuberay/job.yaml", "aws.yaml", "gcp.yaml")
        for text in texts(loaded(name))
        if "raysft:" in text
    }
    assert said == IMAGES
    for image in IMAGES:
        line = f"--build-arg DEVICE={image.rpartition(':')[2]} -t {image} ."
        assert line in dockerfile() and line in (CLUSTER / "README.md").read_text()
    for name in LAUNCHED:
        tree = loaded(f"{name}.yaml")
        assert tree["docker"]["image"] == "registry.example.com/raysft:cpu"
        worker = tree["available_node_types"]["trainers"]["docker"]["worker_image"]
        assert worker == "registry.example.com/raysft:gpu"
    assert container(groups()["trainers"])["image"] == "registry.example.com/raysft:gpu"
    assert container(groups()["data"])["image"] == "registry.example.com/raysft:cpu"


def test_ports_agree() -> None:
    ports = {
        p["name"]: p["containerPort"] for p in container(ray_cluster()["headGroupSpec"])["ports"]
    }
    assert ports == PORTS
    for name in LAUNCHED:
        tree = loaded(f"{name}.yaml")
        head = " ".join(tree["head_start_ray_commands"])
        flags = dict(re.findall(r"--([\w-]*port)=(\d+)", head))
        assert int(flags["port"]) == PORTS["gcs"]
        assert int(flags["dashboard-port"]) == PORTS["dashboard"]
        assert int(flags["ray-client-server-port"]) == PORTS["client"]
        assert int(flags["metrics-export-port"]) == PORTS["metrics"]
        workers = " ".join(tree["worker_start_ray_commands"])
        assert f"--address=$RAY_HEAD_IP:{PORTS['gcs']} " in workers
        assert f"RAY_ADDRESS=$RAY_HEAD_IP:{PORTS['gcs']} " in workers
        assert f"--metrics-export-port={PORTS['metrics']}" in workers
        again = re.findall(r"--object-manager-port=(\d+)", head + workers)
        assert len(again) == 2 and len(set(again)) == 1


def test_the_readme_names_every_file_and_what_is_to_be_changed() -> None:
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    for path in CLUSTER.rglob("*"):
        if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts:
            assert str(path.relative_to(CLUSTER)) in readme, path
    for word in ("CHANGE-ME", "registry.example.com", "raysft-token", "auth_token"):
        assert word in readme
