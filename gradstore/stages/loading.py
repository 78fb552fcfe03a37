"""A run's model as a worker holds it: loaded once per process, with its feature extractor."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from gradstore.adapters import resolve_precision
from gradstore.errors import ContractError, DataError
from gradstore.plan.resolve import make_adapter, model_shape, resolve_device, resolve_projection
from gradstore.spec import RunSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradstore.adapters import Adapter
    from gradstore.numerics.gradients import FeatureExtractor
    from gradstore.store.examples import Example
    from gradstore.store.features import FeatureStore

THREADS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model on its device, what computes its features, and in which precision."""

    adapter: Adapter
    model: nn.Module
    extractor: FeatureExtractor
    precision: str
    device: str

    def outputs(self, model: nn.Module, examples: Sequence[Example], *, exactly: bool = False) -> Tensor:
        """f(example; theta) [B] in the run's precision, or in float32 where ``exactly`` is asked for."""
        import torch

        enabled = self.precision == "bfloat16" and not exactly
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=enabled):
            return self.adapter.outputs(model, examples)

    def facts(self) -> dict[str, object]:
        """What computed a block, for its record."""
        packages = {name: version(name) for name in ("gradstore", "torch", "transformers")}
        return {"versions": packages, "device": self.device, "precision": self.precision, "threads": THREADS}

    def features(self, examples: Sequence[Example]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Outputs [B] and features {group: [B, k_j]} of one batch."""
        outputs_B, features = self.extractor(lambda: self.outputs(self.model, examples))
        return outputs_B.double().cpu().numpy(), {name: rows.cpu().numpy() for name, rows in features.items()}


def load_for(store: FeatureStore, spec: RunSpec) -> Loaded:
    """The model of a run as the store's contract has it; once per process.

    Raises
    ------
    ContractError
        If this worker finds other weights than the creator of the store did, under the same name.
    """
    return _load(spec.model_dump_json(), store.contract["model"]["precision"], store.contract["model"]["weights"])


def load_first(spec: RunSpec) -> Loaded:
    """The model of a run whose store may not exist yet."""
    return _load(spec.model_dump_json(), None, None)


@lru_cache(maxsize=1)
def _load(spec_json: str, precision: str | None, weights: str | None) -> Loaded:
    import torch

    from gradstore.numerics.gradients import FeatureExtractor

    # One thread: sums in one order whatever the machine does besides, so a block is bit-identical whoever computes it.
    torch.set_num_threads(THREADS)
    spec = RunSpec.model_validate_json(spec_json)
    adapter, device = make_adapter(spec), resolve_device(spec)
    model = adapter.load(device)
    if weights is not None and (found := weights_hash(model)) != weights:
        # A hub's branch moves, a folder is overwritten: features of two models in one set would be noise.
        raise ContractError(
            f"model.source: {spec.model.source} has weights {found} on {platform.node()}, the store was made with "
            f"{weights}. Give every worker the same model, or choose another run.store."
        )
    _refuse_non_finite(model, spec.model.source)
    groups = model_shape(adapter, model, spec).partition.groups
    return Loaded(
        adapter=adapter,
        model=model,
        extractor=FeatureExtractor(model, groups, resolve_projection(spec), seed=spec.run.seed),
        precision=precision or resolve_precision(spec.model.precision, device),
        device=device,
    )


def _refuse_non_finite(model: nn.Module, source: str) -> None:
    """A model that holds NaN would blame every example for its loss."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(
                f"model.source: tensor {name} of {source} holds NaN or infinite values. Name a sound model."
            )


def weights_hash(model: nn.Module) -> str:
    """Hex digest of a model's parameters and buffers: names, types, shapes and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
