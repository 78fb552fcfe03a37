"""[cluster]: where tasks run."""

from __future__ import annotations

import os
from typing import Any, Literal

import psutil
from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.quantities import parse_bytes
from gradstore.spec.section import Section

# Part of the machine's memory that the workers of an embedded cluster share; the rest is this process and the page cache.
MEMORY_SHARE = 0.8
# Kinds that ask other machines for workers.
BATCH_KINDS = ("slurm", "kubernetes")


class ClusterSection(Section):
    """[cluster]: where tasks run.

    ``options`` are those of the kind; what a kind accepts is checked before anything runs. With ``minimum`` a Slurm or
    Kubernetes cluster has from ``minimum`` to ``workers`` workers, as there is work.
    """

    kind: Literal["local", "scheduler", "slurm", "kubernetes"] = "local"
    address: str | None = None
    workers: int | None = Field(default=None, ge=1, le=100_000)
    minimum: int | None = Field(default=None, ge=0)
    memory_per_worker: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def num_workers(self) -> int:
        """Workers of the run: as declared, else one per core of this machine."""
        return self.workers or os.cpu_count() or 1

    @property
    def worker_memory_bytes(self) -> int:
        """Memory that one worker may use: as declared, else its share of this machine's memory."""
        if self.memory_per_worker == "auto":
            return int(psutil.virtual_memory().total * MEMORY_SHARE) // self.num_workers
        return parse_bytes("cluster.memory_per_worker", self.memory_per_worker)

    @property
    def model_resources(self) -> dict[str, float]:
        """What a task that runs the model asks of its worker, in Dask's terms."""
        return {"GPU": 1.0} if self.device == "cuda" else {}

    def at(self, address: str) -> ClusterSection:
        """Return the same on the workers of a scheduler, whatever the kind."""
        return ClusterSection(
            kind="scheduler",
            address=address,
            workers=self.workers,
            memory_per_worker=self.memory_per_worker,
            device=self.device,
        )

    @model_validator(mode="after")
    def _check(self) -> ClusterSection:
        if self.memory_per_worker != "auto":
            parse_bytes("cluster.memory_per_worker", self.memory_per_worker)
        if self.kind == "scheduler" and self.address is None:
            raise SpecError('cluster.address: is missing; kind = "scheduler" needs one, such as "tls://host:8786".')
        if self.kind in BATCH_KINDS:
            self._check_batch()
        elif self.minimum is not None:
            raise SpecError(
                f'cluster.minimum: found {self.minimum} with kind = "{self.kind}"; only {" and ".join(BATCH_KINDS)} start '
                "and end workers as there is work. Leave it out."
            )
        return self

    def _check_batch(self) -> None:
        """Other machines are not measured by this one, so what is asked of them is said."""
        for key, missing in (
            ("workers", self.workers is None),
            ("memory_per_worker", self.memory_per_worker == "auto"),
        ):
            if missing:
                raise SpecError(
                    f'cluster.{key}: is missing; kind = "{self.kind}" needs it, since other machines are asked.'
                )
        if self.minimum is not None and self.minimum > self.num_workers:
            raise SpecError(
                f"cluster.minimum: found {self.minimum}; accepted: 0 to cluster.workers, which is {self.num_workers}."
            )
