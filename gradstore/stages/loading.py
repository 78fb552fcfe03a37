"""A run's model as a worker holds it: loaded once per process, with its feature extractor."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.adapters import WithResiduals, resolve_precision
from gradstore.adapters.models.optimizer import read_divisors
from gradstore.errors import ContractError, DataError
from gradstore.plan.resolve import make_adapter, model_shape, resolve_device, resolve_projection
from gradstore.spec import RunSpec
from gradstore.store.artifacts import MatricesArtifact
from gradstore.store.backend import open_storage

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gradstore.adapters import Adapter
    from gradstore.groups import ParameterGroup
    from gradstore.numerics.gradients import FeatureExtractor
    from gradstore.store.examples import Example
    from gradstore.store.features import FeatureStore

THREADS = 1
# The artifact of principal components that a store's projection is made of.
COMPONENTS = "components"
# Whose versions are kept with a block that they computed.
PACKAGES = ("gradstore", "torch", "transformers", "peft", "diffusers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What was computed of a batch of examples, in numpy.

    Attributes
    ----------
    outputs
        f(example; theta), float64 [B].
    features
        [B, k_j] by group, float32.
    covariances
        By part, (left [r_o, r_o], right [r_i, r_i], positions): sums over the batch's positions, in float64.
    residuals
        How wrong the model is about each example, float64 [B], where the output function needs it: that of DAS.
    """

    outputs: np.ndarray
    features: Mapping[str, np.ndarray]
    covariances: Mapping[str, tuple[np.ndarray, np.ndarray, int]]
    residuals: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, its groups, and in which precision it is run."""

    adapter: Adapter
    model: nn.Module
    groups: tuple[ParameterGroup, ...]
    precision: str
    device: str

    def outputs(self, model: nn.Module, examples: Sequence[Example], *, exactly: bool = False) -> Tensor:
        """f(example; theta) [B] in the run's precision, or in float32 where ``exactly`` is asked for."""
        with self._autocast(exactly=exactly):
            return self.adapter.outputs(model, examples)

    def outputs_and_residuals(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        """f(example; theta) [B] as `outputs`, and of the same pass the residuals [B] where f needs them."""
        if not isinstance(self.adapter, WithResiduals):
            return self.outputs(self.model, examples), None
        with self._autocast():
            return self.adapter.outputs_and_residuals(self.model, examples)

    def _autocast(self, *, exactly: bool = False) -> torch.autocast:
        import torch

        enabled = self.precision == "bfloat16" and not exactly
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=enabled)

    def facts(self) -> dict[str, object]:
        """What computed a block, for its record."""
        return {
            "versions": {name: version(name) for name in PACKAGES if name in sys.modules},
            "device": self.device,
            "precision": self.precision,
            "threads": THREADS,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(LoadedModel):
    """A model with what computes its features: of examples, and of those that it was trained on.

    The two differ where model.optimizer names the state of Adam: of training examples the features are then of the
    direction of its step.
    """

    extractor: FeatureExtractor
    training_extractor: FeatureExtractor
    divisors: Mapping[str, Tensor] | None

    def identity(self) -> dict[str, str]:
        """What the contract holds of a member: the hash of its weights, and of its optimizer's state if there is one."""
        identity = {"weights": tensors_hash(self.model.state_dict())}
        return identity if self.divisors is None else {**identity, "optimizer": tensors_hash(self.divisors)}

    def compute(self, examples: Sequence[Example], *, training: bool = False, covariances: bool = False) -> Batch:
        """Outputs and features of one batch, and the covariances of its projected factors if asked for."""
        extractor = self.training_extractor if training else self.extractor
        residual_B: Tensor | None = None

        def outputs() -> Tensor:
            nonlocal residual_B
            output_B, residual_B = self.outputs_and_residuals(examples)
            return output_B

        found = extractor(outputs, examples=len(examples), covariances=covariances)
        return Batch(
            outputs=found.outputs.double().cpu().numpy(),
            features=_in_numpy(found.features),
            covariances={
                part: (item.left.double().cpu().numpy(), item.right.double().cpu().numpy(), int(item.positions))
                for part, item in found.covariances.items()
            },
            residuals=None if residual_B is None else residual_B.double().cpu().numpy(),
        )

    def before_factors(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """Features of one batch whose distances mean something: those that are factors as the matrices before."""
        found = self.extractor(lambda: self.outputs(self.model, examples), examples=len(examples), finished=False)
        return _in_numpy(found.features)


def _in_numpy(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors in host memory: of a GPU all copied at once beside its other work, and waited for once."""
    import torch

    devices = {tensor.device for tensor in tensors.values()}
    if not any(device.type == "cuda" for device in devices):
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    (device,) = devices
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    hosts = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in tensors.items()}
    with torch.cuda.stream(stream):
        for name, tensor in tensors.items():
            hosts[name].copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
    stream.synchronize()
    return {name: host.numpy() for name, host in hosts.items()}


def load_for(store: FeatureStore, spec: RunSpec, member: str | None = None) -> Loaded:
    """A member of a run's model, the last unless one is named, as the store's contract has it; once per process.

    Raises
    ------
    ContractError
        If this worker finds other weights, or another state of its optimizer, than the creator of the store did.
    """
    member = member or [*spec.model.etas][-1]
    expected = json.dumps(store.contract["members"][member], sort_keys=True)
    return _load(spec.model_dump_json(), member, store.contract["model"]["precision"], expected)


def load_first(spec: RunSpec, member: str | None = None) -> Loaded:
    """A member of the model of a run whose store may not exist yet, the last unless one is named."""
    return _load(spec.model_dump_json(), member or [*spec.model.etas][-1], None, None)


def load_model(spec: RunSpec) -> LoadedModel:
    """The last member of a run's model alone: features may need what is yet to be found with it."""
    return _load_model(spec.model_dump_json(), [*spec.model.etas][-1])


@lru_cache(maxsize=1)
def _load_model(spec_json: str, member: str) -> LoadedModel:
    import torch

    # The model of another member goes before this one comes: there may be no room for two.
    _load.cache_clear()
    _load_model.cache_clear()
    # One thread: sums in one order whatever the machine does besides, so a block is bit-identical whoever computes it.
    torch.set_num_threads(THREADS)
    spec = RunSpec.model_validate_json(spec_json)
    adapter, device = make_adapter(spec, member), resolve_device(spec)
    model = adapter.load(device)
    _refuse_non_finite(model, spec.model.of_member(member).source)
    return LoadedModel(
        adapter=adapter,
        model=model,
        groups=model_shape(adapter, model, spec).partition.groups,
        precision=resolve_precision(spec.model.precision, device),
        device=device,
    )


@lru_cache(maxsize=1)
def _load(spec_json: str, member: str, precision: str | None, expected: str | None) -> Loaded:
    from gradstore.numerics.gradients import FeatureExtractor

    # The matrices and divisors of the last extractor go before others come.
    _load.cache_clear()
    spec = RunSpec.model_validate_json(spec_json)
    loaded = _load_model(spec_json, member)
    loaded = replace(loaded, precision=precision or loaded.precision)
    divisors = _divisors(spec, member, loaded)
    make = partial(
        FeatureExtractor,
        loaded.model,
        loaded.groups,
        resolve_projection(spec),
        seed=spec.run.seed,
        matrices=read_components(spec),
    )
    extractor = make()
    made = Loaded(
        **{field.name: getattr(loaded, field.name) for field in fields(loaded)},
        extractor=extractor,
        training_extractor=extractor if divisors is None else make(divisors=divisors),
        divisors=divisors,
    )
    if expected is not None:
        _refuse_other_member(spec, member, made.identity(), json.loads(expected))
    return made


def _divisors(spec: RunSpec, member: str, loaded: LoadedModel) -> dict[str, Tensor] | None:
    """By parameter, what Adam divides its gradient by, as canonical matrices; None if no optimizer is named.

    Raises
    ------
    DataError
        If a parameter that is in a group has none.
    """
    from gradstore.numerics.gradients import canonical_matrices

    file = spec.model.of_member(member).optimizer
    if file is None:
        return None
    found = canonical_matrices(loaded.model, read_divisors(file, loaded.model))
    for group in loaded.groups:
        for part in group.parts:
            if part.parameter not in found:
                raise DataError(
                    f"model.optimizer: {file} has no state of {part.parameter}, which is in group {group.name}. Leave it out "
                    "with features.groups.exclude, or name an optimizer that has trained it."
                )
    return found


def _refuse_other_member(spec: RunSpec, member: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    # A hub's branch moves, a folder is overwritten: features of two models in one set would be noise.
    for key, wanted in expected.items():
        if found.get(key) != wanted:
            what = "source" if key == "weights" else "optimizer"
            name = getattr(spec.model.of_member(member), what)
            raise ContractError(
                f"model.{what}: {name} has {key} {found.get(key)} on {platform.node()}, the store was made with {wanted}. "
                "Give every worker the same model, or choose another run.store."
            )


def read_components(spec: RunSpec) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The principal components that the run's projection takes from its store; None if it takes none.

    Raises
    ------
    NotReadyError
        If they are not found yet.
    """
    import torch

    if not resolve_projection(spec).needs_matrices:
        return None
    artifact = MatricesArtifact.open(open_storage(spec.run.store), COMPONENTS)
    return {
        part: (torch.from_numpy(left), torch.from_numpy(right)) for part, (left, right) in artifact.read_all().items()
    }


def _refuse_non_finite(model: nn.Module, source: str) -> None:
    """A model that holds NaN would blame every example for its loss."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(
                f"model.source: tensor {name} of {source} holds NaN or infinite values. Name a sound model."
            )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of named tensors: names, types, shapes and bytes."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # As bytes: numpy has no bfloat16.
        octets: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(octets)
    return digest.hexdigest()
