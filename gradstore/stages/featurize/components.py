"""The pre-pass of a projection whose matrices come from data: principal components of the first training examples."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradstore.cluster import Engine, Task
from gradstore.errors import ContractError, DataError
from gradstore.groups import ParameterGroup
from gradstore.plan import Plan
from gradstore.plan.resolve import resolve_projection
from gradstore.plan.sizes import component_bundles
from gradstore.spec import RunSpec
from gradstore.stages.featurize.batches import batches
from gradstore.stages.loading import COMPONENTS, LoadedModel, load_model, read_components, tensors_hash
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import MatricesArtifact
from gradstore.store.backend import open_storage
from gradstore.store.examples import Example, data_hash

if TYPE_CHECKING:
    from torch import Tensor

    from gradstore.numerics.projection import Projection


def find_components(
    spec: RunSpec, plan: Plan, engine: Engine, progress: Progress, examples: Sequence[Example]
) -> str | None:
    """Write the principal components that the store does not hold yet, and return their hash; None if none are needed.

    With several members they are those of the last, the final checkpoint.

    Raises
    ------
    ContractError
        If the store holds those of another model, of other examples or of another projection.
    """
    projection = plan.projection
    if not projection.needs_matrices:
        return None
    rows = list(examples[: projection.pca_rows])  # type: ignore[attr-defined]
    groups = plan.partition.groups
    looking = Task(name="components-model", function=identify, arguments=(spec.model_dump(),))
    [(_, model)] = engine.run([looking])
    artifact = MatricesArtifact.create(
        open_storage(spec.run.store),
        COMPONENTS,
        settings={"model": model, "projection": dict(spec.features.projection), "examples": data_hash(rows)},
        shapes=_shapes(groups, projection),
        bundles=component_bundles(groups),
    )
    tasks = [
        Task(
            name=f"components-{bundle:04d}",
            function=find_bundle,
            arguments=(spec.model_dump(), bundle, rows),
            rows=len(artifact.bundles[bundle]),
            resources=spec.cluster.model_resources,
        )
        for bundle in artifact.missing_units()
    ]
    total = sum(map(len, artifact.bundles))
    done = total - sum(task.rows for task in tasks)
    with progress.stage("principal components", total if tasks else 0, "parts", done) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)
    found = read_components(spec)
    assert found is not None
    return tensors_hash(
        {f"{part}|{side}": matrix for part, pair in found.items() for side, matrix in zip("oi", pair, strict=True)}
    )


def identify(run: Mapping[str, Any]) -> dict[str, Any]:
    """Task: return what principal components depend on beside examples and projection: the model and what it puts out."""
    loaded = load_model(RunSpec.model_validate(run))
    weights = tensors_hash(loaded.model.state_dict())
    return {"weights": weights, "output": str(loaded.adapter.identity()["output"]), "precision": loaded.precision}


def find_bundle(run: Mapping[str, Any], bundle: int, examples: Sequence[Example]) -> int:
    """Task: find and commit the principal components of one bundle of parts; return how many.

    The examples are an argument, as those of `prepare` are: the sets that could hold them need the components first.

    Raises
    ------
    ContractError
        If this worker finds another model than the one that the components are of.
    """
    spec = RunSpec.model_validate(run)
    artifact = MatricesArtifact.open(open_storage(spec.run.store), COMPONENTS)
    wanted, model = artifact.settings["model"], identify(run)
    if differing := [key for key in wanted if model[key] != wanted[key]]:
        key = differing[0]
        raise ContractError(
            f"model.source: {key} is {model[key]} on {platform.node()}, the principal components are of {wanted[key]}. Give "
            "every worker the same model, or choose another run.store."
        )
    found = components(load_model(spec), resolve_projection(spec), artifact.bundles[bundle], examples)
    artifact.write_bundle(
        bundle,
        {part: (left.numpy(), right.numpy()) for part, (left, right) in found.items()},
        facts={"rows": len(examples)},
    )
    return len(found)


def components(
    loaded: LoadedModel, projection: Projection, parts: Sequence[str], examples: Sequence[Example]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The principal components (P_o, P_i) of some parts of a model; examples without a finite gradient add nothing.

    Raises
    ------
    DataError
        If no example has one.
    """
    from gradstore.numerics.gradients import FeatureExtractor
    from gradstore.numerics.projection import SecondMoments

    wanted, moments = set(parts), SecondMoments()
    groups = [
        replace(group, parts=kept)
        for group in loaded.groups
        if (kept := tuple(part for part in group.parts if part.key in wanted))
    ]
    extractor = FeatureExtractor(loaded.model, groups, moments, seed=0)
    sizes = [example.size for example in examples]
    finite = 0
    for rows in batches(sizes, max(sizes)):
        batch = [examples[row] for row in rows]
        found = extractor(lambda batch=batch: loaded.outputs(loaded.model, batch), examples=len(batch))  # type: ignore[misc]
        finite += int(found.outputs.isfinite().sum())
    if finite == 0:
        raise DataError(
            f"the outputs of all {len(examples):,} examples that principal components are found from are not finite, such as "
            f"that of {examples[0].example_id}. Mend the data or the model."
        )
    shapes = _shapes(groups, projection)
    return moments.components({part: (shapes[part][0][0], shapes[part][1][0]) for part in shapes})


def _shapes(
    groups: Sequence[ParameterGroup], projection: Projection
) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """By part, the shapes of P_o and P_i."""
    found = {}
    for group in groups:
        for part in group.parts:
            ranks = projection.shape(part)
            assert ranks is not None, "principal components belong to two-sided projections"
            found[part.key] = (ranks[0], part.out_features), (ranks[1], part.in_features)
    return found
