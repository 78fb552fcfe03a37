"""A DaskCluster of the Dask operator, made by this command and deleted with it."""

from __future__ import annotations

import copy
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.cluster.kinds.scheduler import connect
from gradstore.errors import ResourceError, SpecError, TaskError
from gradstore.spec import resolve_kind

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

API = "kubernetes.dask.org/v1"
PORT = 8786
# Nodes may have to be started and an image pulled.
STARTS_WITHIN_SECONDS = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesOptions:
    """[cluster.options] of Kubernetes.

    Attributes
    ----------
    manifest
        A file with the DaskCluster, such as deploy/kubernetes/cluster.yaml: image, certificates, what a pod may use. How
        many workers there are, and the memory of each, is what [cluster] says.
    namespace
        Where it is made.
    address
        Of its scheduler, if this command reaches it otherwise than a pod would.
    """

    manifest: str
    namespace: str = "default"
    address: str | None = None


def on_kubernetes(section: ClusterSection, stack: ExitStack) -> Client:
    """Make the DaskCluster, wait for its scheduler and connect to it; it is deleted with this command.

    Raises
    ------
    ResourceError
        If the package kr8s is not installed.
    SpecError
        If the manifest is not readable or holds no DaskCluster.
    TaskError
        If Kubernetes refuses or does not answer, or the scheduler does not come up.
    """
    options = resolve_kind({"kubernetes": KubernetesOptions}, "kubernetes", section.options, "cluster.options")
    manifest = read_manifest(options.manifest)
    name = manifest["metadata"]["name"]
    for wanted in resources(manifest, section):
        _create(wanted, options.namespace, stack)
    address = options.address or f"tls://{name}-scheduler.{options.namespace}.svc.cluster.local:{PORT}"
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        try:
            return connect("cluster.options.address", address, stack, timeout="10s")
        except TaskError as error:
            if time.monotonic() > deadline:
                raise TaskError(
                    f"the scheduler of DaskCluster {name} does not answer at {address} after "
                    f"{STARTS_WITHIN_SECONDS / 60:.0f} min: is the Dask operator installed, and does its pod run?"
                ) from error


def read_manifest(path: str) -> dict[str, Any]:
    """Return the DaskCluster of a file that may hold other resources beside it.

    Raises
    ------
    SpecError
        If the file is not readable or holds none.
    """
    import yaml

    try:
        documents = list(yaml.safe_load_all(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"cluster.options.manifest: {path} is not readable as YAML: {error}.") from error
    for document in documents:
        if not isinstance(document, dict) or document.get("kind") != "DaskCluster":
            continue
        try:
            _container(document)
            document["metadata"]["name"].encode()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise SpecError(
                f"cluster.options.manifest: the DaskCluster of {path} has no metadata.name or no "
                "spec.worker.spec.containers; deploy/kubernetes/cluster.yaml has them."
            ) from error
        return document
    raise SpecError(f'cluster.options.manifest: {path} has no resource of kind "DaskCluster".')


def resources(manifest: dict[str, Any], section: ClusterSection) -> list[dict[str, Any]]:
    """Return what is made: the DaskCluster with the workers and memory of [cluster], and with ``minimum`` what scales it."""
    cluster = copy.deepcopy(manifest)
    worker = cluster["spec"]["worker"]
    worker["replicas"] = section.num_workers if section.minimum is None else max(1, section.minimum)
    container = _container(cluster)
    limits = container.setdefault("resources", {})
    for kind in ("limits", "requests"):
        limits[kind] = {**limits.get(kind, {}), "memory": str(section.worker_memory_bytes)}
    if section.minimum is None:
        return [cluster]
    name = cluster["metadata"]["name"]
    autoscaler = {
        "apiVersion": API,
        "kind": "DaskAutoscaler",
        "metadata": {"name": name},
        "spec": {"cluster": name, "minimum": section.minimum, "maximum": section.num_workers},
    }
    return [cluster, autoscaler]


def _container(manifest: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = manifest["spec"]["worker"]["spec"]["containers"][0]
    return container


def _create(resource: dict[str, Any], namespace: str, stack: ExitStack) -> None:
    try:
        import kr8s
        from kr8s.objects import new_class
    except ImportError as error:
        raise ResourceError(
            f'cluster.kind: "kubernetes" needs the package {error.name}, which is not installed. '
            "pip install 'gradstore[kubernetes]'"
        ) from error
    import httpx

    kind, name = resource["kind"], resource["metadata"]["name"]
    try:
        made = new_class(kind, API, namespaced=True)(resource, namespace=namespace)
        made.create()
    except (kr8s.ServerError, kr8s.APITimeoutError, httpx.HTTPError, OSError, ValueError) as error:
        raise TaskError(
            f"Kubernetes did not make {kind} {name} in namespace {namespace}: {error}. The Dask operator must be installed, "
            "and this user or service account be allowed to make it."
        ) from error
    stack.callback(made.delete)
