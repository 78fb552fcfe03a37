"""A DaskCluster of the Dask operator, made by this command and deleted with it."""

from __future__ import annotations

import copy
import logging
import threading
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
SCALE_SECONDS = 10.0
IDLE_SECONDS = 60.0
# What Dask takes a task to last before one has been timed: a worker is asked for each.
TASK_SECONDS = "0.5s"
_LOGGER = logging.getLogger(__name__)


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
    made = _create(sized(manifest, section), options.namespace, stack)
    client = _connect(name, options, stack)
    if section.minimum is not None:
        stopped = threading.Event()
        thread = threading.Thread(target=_scale, args=(client, made, section, stopped), daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stopped.set)
    return client


def _connect(name: str, options: KubernetesOptions, stack: ExitStack) -> Client:
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
            _memory_of(_container(document))
            document["metadata"]["name"].encode()
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"cluster.options.manifest: the DaskCluster of {path} has no metadata.name, no spec.worker.spec.containers, or "
                "resources that are no tables; deploy/kubernetes/cluster.yaml has them."
            ) from error
        return document
    raise SpecError(f'cluster.options.manifest: {path} has no resource of kind "DaskCluster".')


def sized(manifest: dict[str, Any], section: ClusterSection) -> dict[str, Any]:
    """Return a DaskCluster with the workers and the memory of [cluster]; with ``minimum``, as many as it begins with."""
    cluster = copy.deepcopy(manifest)
    cluster["spec"]["worker"]["replicas"] = section.num_workers if section.minimum is None else max(1, section.minimum)
    container = _container(cluster)
    container["resources"] = _memory_of(container, str(section.worker_memory_bytes))
    return cluster


def wanted_workers(target: int, now: int, idle_seconds: float, limits: tuple[int, int]) -> int:
    """Return how many workers there should be: more as soon as there is work, the least after some time without any.

    Which pod ends is the operator's choice, and it may be one at work: so none ends before all work is done.
    """
    minimum, maximum = limits
    if target > now:
        return min(target, maximum)
    return minimum if idle_seconds >= IDLE_SECONDS else now


def _scale(client: Client, made: Any, section: ClusterSection, stopped: threading.Event) -> None:
    """Ask for workers as there is work, until stopped.

    The operator's own DaskAutoscaler asks the scheduler without encryption, and is not answered.
    """
    assert section.minimum is not None, "only then is there something to scale"
    now, idle_since = max(1, section.minimum), time.monotonic()
    while not stopped.wait(SCALE_SECONDS):
        try:
            target = client.sync(client.scheduler.adaptive_target, target_duration=TASK_SECONDS)
            if target:
                idle_since = time.monotonic()
            idle = time.monotonic() - idle_since
            if (wanted := wanted_workers(target, now, idle, (section.minimum, section.num_workers))) != now:
                made.patch({"spec": {"worker": {"replicas": wanted}}})
                now = wanted
        # It is asked again; that the scheduler or Kubernetes is gone for good is told by what needs them.
        except Exception as error:
            _LOGGER.warning("workers are not scaled: %s", error)


def _container(manifest: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = manifest["spec"]["worker"]["spec"]["containers"][0]
    return container


def _memory_of(container: dict[str, Any], memory: str = "") -> dict[str, Any]:
    """Resources of a container, with so much memory; what is empty in a manifest is null."""
    resources: dict[str, Any] = dict(container.get("resources") or {})
    return resources | {kind: {**(resources.get(kind) or {}), "memory": memory} for kind in ("limits", "requests")}


def _create(resource: dict[str, Any], namespace: str, stack: ExitStack) -> Any:
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
    return made
