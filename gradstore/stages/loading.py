"""A run's model as a worker holds it: loaded once per process, with its feature extractor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gradstore.adapters import resolve_precision
from gradstore.plan.resolve import make_adapter, model_shape, resolve_device, resolve_projection
from gradstore.spec import RunSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradstore.adapters import Adapter
    from gradstore.numerics.gradients import FeatureExtractor
    from gradstore.store.examples import Example


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

    def features(self, examples: Sequence[Example]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Outputs [B] and features {group: [B, k_j]} of one batch."""
        outputs_B, features = self.extractor(lambda: self.outputs(self.model, examples))
        return outputs_B.double().cpu().numpy(), {name: rows.cpu().numpy() for name, rows in features.items()}


@lru_cache(maxsize=1)
def load(spec_json: str) -> Loaded:
    """Load the model of a run; once per process, until another run is asked for."""
    import torch

    from gradstore.numerics.gradients import FeatureExtractor

    # One thread: sums in one order whatever the machine does besides, so a block is bit-identical whoever computes it.
    torch.set_num_threads(1)
    spec = RunSpec.model_validate_json(spec_json)
    adapter, device = make_adapter(spec), resolve_device(spec)
    model = adapter.load(device)
    groups = model_shape(adapter, model, spec).partition.groups
    return Loaded(
        adapter=adapter,
        model=model,
        extractor=FeatureExtractor(model, groups, resolve_projection(spec), seed=spec.run.seed),
        precision=resolve_precision(spec.model.precision, device),
        device=device,
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
