"""What deploy/ holds is what Docker, Compose, Kubernetes and the Dask operator accept, and gives no more rights than it has to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose_spec
import dask_kubernetes
import jsonschema
import kubernetes_validate
import pytest
import yaml

from gradstore.cluster.kinds import refuse_cluster
from gradstore.cluster.kinds.kubernetes import read_manifest, sized
from gradstore.cluster.kinds.settings import PROCESS, SCHEDULER, WORKER
from gradstore.spec import ClusterSection

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OPERATOR = Path(dask_kubernetes.__file__).parent / "operator/deployment/helm/dask-kubernetes-operator/crds"


def test_the_dockerfile_has_nothing_that_its_linter_finds() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([linter, DEPLOY / "image" / "Dockerfile"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    text = (DEPLOY / "image" / "Dockerfile").read_text()
    installs = re.findall(r"pip install .*", text)
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)
    assert all(re.search(r":\d|^[a-z-]+(\$|\s|$)", image) for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert text.rindex("USER 10001:10001") > text.rindex("RUN ")
    assert {"torch-cpu", "torch-cuda"} <= set(re.findall(r" AS (\S+)", text))


def test_the_image_is_built_from_files_that_exist() -> None:
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (DEPLOY / "image" / "Dockerfile").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    kept = {
        line[1:] for line in (DEPLOY / "image" / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert sources == kept
    assert all((ROOT / name).exists() for name in sources)


def test_a_scheduler_started_by_hand_has_the_settings_of_gradstores_own() -> None:
    found = yaml.safe_load((DEPLOY / "image" / "dask.yaml").read_text())
    assert leaves(found) == {
        **SCHEDULER,
        **WORKER,
        **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in PROCESS.items()},
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def compose() -> dict[str, Any]:
    """compose.yaml with the defaults of its variables."""
    text = (DEPLOY / "compose" / "compose.yaml").read_text()
    found: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return found


def test_compose_is_what_its_specification_allows() -> None:
    read = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    assert set(read.service_names()) == {"storage", "certificates", "scheduler", "worker", "run"}
    wrong = compose()
    wrong["services"]["worker"]["restarts"] = "no"
    with pytest.raises(ValueError, match="restarts"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(wrong))


def test_containers_of_compose_publish_nothing_and_have_no_rights() -> None:
    for name, service in compose()["services"].items():
        assert "ports" not in service, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"], name
        assert not service.get("privileged"), name
        assert not re.search(r"(?i)secret.*key\s*[:=]|password", json.dumps(service.get("environment", {}))), name


def test_keys_of_compose_are_in_files_that_git_ignores() -> None:
    secrets = DEPLOY / "compose" / "secrets"
    ignored = (secrets / ".gitignore").read_text()
    assert {"identities.json", "s3.env"} <= set(ignored.splitlines())
    assert json.loads((secrets / "identities.example.json").read_text())["identities"]
    assert "CHANGE-ME" in (secrets / "s3.example.env").read_text()


def manifests() -> list[dict[str, Any]]:
    paths = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [manifest for path in paths for manifest in yaml.safe_load_all(path.read_text())]


def pods() -> list[dict[str, Any]]:
    found = []
    for manifest in manifests():
        spec = manifest.get("spec", {})
        if manifest["kind"] == "DaskCluster":
            found += [spec["worker"]["spec"], spec["scheduler"]["spec"]]
        elif manifest["kind"] == "Job":
            found.append(spec["template"]["spec"])
    assert len(found) == 3
    return found


def operators_schema() -> dict[str, Any]:
    """The operator's schema of a DaskCluster, closed to fields that it does not name, as kubectl --validate=strict is."""
    definition = yaml.safe_load((OPERATOR / "daskcluster.yaml").read_text())
    schema: dict[str, Any] = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    schema["properties"] |= {"apiVersion": {}, "kind": {}}
    close(schema)
    schema["properties"]["metadata"] = {}
    return schema


def close(node: Any) -> None:
    if isinstance(node, list):
        for item in node:
            close(item)
    if not isinstance(node, dict):
        return
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        node.pop("type", None)
    for item in node.values():
        close(item)


@pytest.mark.parametrize("manifest", manifests(), ids=lambda found: f"{found['kind']}-{found['metadata']['name']}")
def test_a_manifest_is_what_its_schema_allows(manifest: dict[str, Any]) -> None:
    if manifest["kind"] == "DaskCluster":
        jsonschema.validate(manifest, operators_schema())
        section = ClusterSection(kind="kubernetes", workers=3, minimum=1, memory_per_worker="8GiB")
        jsonschema.validate(sized(manifest, section), operators_schema())
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": pods()[0]}
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_a_schema_finds_a_field_that_is_none() -> None:
    wrong = read_manifest(str(DEPLOY / "kubernetes" / "cluster.yaml"))
    wrong["spec"]["worker"]["spec"]["containers"][0]["imag"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="'imag' was unexpected"):
        jsonschema.validate(wrong, operators_schema())


def test_pods_have_limits_and_no_rights_and_get_secrets_by_reference() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["resources"]["limits"]["memory"]
            assert container["envFrom" if "envFrom" in container else "env"]
            assert not [item for item in container["env"] if re.search("SECRET|TOKEN|PASSWORD", item["name"])]


def test_a_pod_has_the_key_of_its_role_alone() -> None:
    secrets = [volume["secret"]["secretName"] for pod in pods() for volume in pod["volumes"] if "secret" in volume]
    assert secrets == [f"gradstore-{role}-certificates" for role in ("worker", "scheduler", "client")]
    readme = (DEPLOY / "kubernetes" / "README.md").read_text()
    for role in ("worker", "scheduler", "client"):
        made = re.search(rf"create secret generic gradstore-{role}-certificates (.*)", readme)
        assert made is not None
        assert re.findall(r"certificates/(\S+)", made[1]) == [
            "dask.yaml",
            "authority.pem",
            f"{role}.pem",
            f"{role}-key.pem",
        ]


def test_every_scheduler_is_reached_by_tls_and_shows_its_dashboard_to_nobody() -> None:
    written = [compose()["services"][name]["command"] for name in ("scheduler", "worker", "run")]
    written += [container.get("args") or container["command"] for pod in pods() for container in pod["containers"]]
    for command in written:
        assert not any("tcp://" in word for word in command)
        if "scheduler" in command[:2]:
            assert command[command.index("--dashboard-address") + 1] == "127.0.0.1:8787"
        if "worker" in command[:2]:
            assert "--no-dashboard" in command
            assert command[command.index("--nthreads") + 1] == "1"


@pytest.mark.parametrize("name", ["run", "workers"])
def test_a_script_of_slurm_is_a_shell_script_with_options_of_sbatch(name: str) -> None:
    path = DEPLOY / "slurm" / f"{name}.sbatch"
    assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
    directives = re.findall(r"^#SBATCH (--\S+)$", path.read_text(), re.MULTILINE)
    assert len(directives) >= 5
    assert "--requeue" in directives


@pytest.mark.parametrize(
    ("name", "actions"),
    [
        ("reader", {"s3:GetObject", "s3:ListBucket"}),
        (
            "writer",
            {
                "s3:GetObject",
                "s3:PutObject",
                "s3:DeleteObject",
                "s3:ListBucket",
                "s3:AbortMultipartUpload",
                "s3:ListMultipartUploadParts",
                "s3:ListBucketMultipartUploads",
            },
        ),
    ],
)
def test_a_policy_gives_these_rights_and_no_others(name: str, actions: set[str]) -> None:
    policy = json.loads((DEPLOY / "s3" / f"{name}.json").read_text())
    given = [statement["Action"] for statement in policy["Statement"]]
    assert {action for found in given for action in ([found] if isinstance(found, str) else found)} == actions
    assert not [found for found in actions if "*" in found]
    assert {statement["Resource"] for statement in policy["Statement"]} == {
        "arn:aws:s3:::BUCKET",
        "arn:aws:s3:::BUCKET/PREFIX/*",
    }


def test_the_manifest_of_kubernetes_is_one_that_a_run_takes() -> None:
    section = ClusterSection(
        kind="kubernetes",
        workers=2,
        memory_per_worker="8GiB",
        options={"manifest": str(DEPLOY / "kubernetes" / "cluster.yaml")},
    )
    refuse_cluster(section)
    assert sized(read_manifest(section.options["manifest"]), section)["spec"]["worker"]["replicas"] == 2


def test_links_of_the_readmes_lead_somewhere() -> None:
    for page in DEPLOY.rglob("*.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert {page.parent.name for page in DEPLOY.glob("*/README.md")} == {
        folder.name for folder in DEPLOY.iterdir() if folder.is_dir()
    }
