"""One function per kind of cluster: section of run.toml -> Dask client.

local       worker processes of this command
scheduler   workers of a scheduler that others started
slurm       a Slurm job for each worker, asked for by this command
kubernetes  a DaskCluster of the operator, made and deleted by this command
settings    what Dask is told, whoever starts it
addresses   which addresses of a scheduler are refused
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradstore.cluster.kinds.addresses import refuse_address
from gradstore.cluster.kinds.kubernetes import KubernetesOptions, on_kubernetes
from gradstore.cluster.kinds.local import on_this_machine
from gradstore.cluster.kinds.scheduler import on_scheduler
from gradstore.cluster.kinds.slurm import SlurmOptions, on_slurm
from gradstore.errors import SpecError
from gradstore.spec import resolve_kind

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

__all__ = ["CLUSTERS", "OPTIONS", "refuse_cluster", "refuse_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """Of a kind that has none."""


CLUSTERS: Mapping[str, Callable[[ClusterSection, ExitStack], Client]] = {
    "local": on_this_machine,
    "scheduler": on_scheduler,
    "slurm": on_slurm,
    "kubernetes": on_kubernetes,
}
OPTIONS: Mapping[str, type[Any]] = {
    "local": NoOptions,
    "scheduler": NoOptions,
    "slurm": SlurmOptions,
    "kubernetes": KubernetesOptions,
}


def refuse_cluster(section: ClusterSection) -> None:
    """Refuse, before anything runs, options that the kind does not have and a scheduler that anyone could use.

    Raises
    ------
    SpecError
        If an option is unknown, missing or of the wrong type, an address is neither on this machine nor encrypted, or this
        machine is to compute with a GPU that it has not.
    """
    if section.kind == "local":
        refuse_device("cluster.device", section.device)
    options = resolve_kind(OPTIONS, section.kind, section.options, "cluster.options")
    if section.kind == "scheduler":
        assert section.address is not None, "ClusterSection refuses a scheduler without an address"
        refuse_address("cluster.address", section.address)
    if isinstance(options, KubernetesOptions) and options.address is not None:
        refuse_address("cluster.options.address", options.address)


def refuse_device(key: str, device: str) -> None:
    """Refuse a device that this machine has not.

    Raises
    ------
    SpecError
        If it is CUDA, and torch finds none.
    """
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise SpecError(
                f'{key}: found "cuda", and torch finds no CUDA device on this machine; accepted: "auto", "cpu".'
            )
