"""What featurize stores, under every projection and grouping rule, is the oracle's; and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.adapters import Adapter
from gradstore.errors import ContractError, DataError, SpecError
from gradstore.groups import ParameterGroup
from gradstore.plan.resolve import make_adapter, model_shape, resolve_projection
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.loading import read_components
from gradstore.stages.progress import Progress
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.projections import expanded, expected
from tests.runs import InThisProcess, make_run

pytestmark = pytest.mark.slow

EVERYTHING = {"biases": True, "norms": True, "embeddings": True}
ONE = {"cluster": {"workers": 1}}


def run_of(tiny_run: Path, folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> RunSpec:
    """A run of 20 examples in float32, without its features."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        (folder / "model").symlink_to(tiny_run / "model")
    small = {"data.train": {"rows": 20}, "data.learn": {"rows": 3}, "data.eval": {"rows": 3}, **ONE}
    return read_spec(make_run(folder, str(folder / "store"), {**small, **changes}))


def featurized(spec: RunSpec) -> FeatureStore:
    featurize(spec, InThisProcess(), Progress(quiet=True))  # type: ignore[arg-type]
    return FeatureStore.open(spec.run.store)


def rows_of(store: FeatureStore, set_name: str) -> dict[str, np.ndarray]:
    feature_set = store.open_set(set_name)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def examples_of(store: FeatureStore, set_name: str) -> list[Example]:
    feature_set = store.open_set(set_name)
    return [row for block in range(feature_set.info.num_blocks) for row in from_table(feature_set.read_inputs(block))]


def model_of(spec: RunSpec) -> tuple[Adapter, nn.Module, tuple[ParameterGroup, ...]]:
    adapter = make_adapter(spec)
    model = adapter.load("cpu")
    return adapter, model, model_shape(adapter, model, spec).partition.groups


def gradients_of(spec: RunSpec, examples: list[Example]) -> list[dict[str, np.ndarray]]:
    adapter, model, _ = model_of(spec)
    return [
        oracle.gradient(model, lambda m, e=example: adapter.outputs(m, [e]))  # type: ignore[misc]
        for example in examples
    ]


@pytest.mark.parametrize(
    ("projection", "groups"),
    [
        ({"kind": "identity"}, {"include": ".*self_attn.k_proj", "max_skipped": 1.0}),
        ({"kind": "dense", "features": 16}, {"rule": "block"}),
        ({"kind": "sjlt", "features": 16, "nonzeros": 2}, {"rule": "head"}),
        ({"kind": "fact-sjlt", "features": 16, "mask": 8}, {"rule": "tensor", **EVERYTHING}),
        ({"kind": "lorif", "rank": 5, "factors": 2}, {"rule": "module"}),
        (
            {"kind": "logra", "rank": 3, "matrices": "normal"},
            {"rule": "patterns", "patterns": {r'"layer \\1"': r".*layers\.(\d+)\..*", "rest": ".*"}, **EVERYTHING},
        ),
    ],
    ids=lambda value: str(value.get("kind", value.get("rule"))),
)
def test_stored_features_are_the_projected_gradients(
    tiny_run: Path, tmp_path: Path, projection: dict[str, Any], groups: dict[str, Any]
) -> None:
    spec = run_of(
        tiny_run,
        tmp_path,
        {"features": {"projection": projection, "dtype": "float32", "token_budget": 96, "groups": groups}},
    )

    store = featurized(spec)

    _, _, made = model_of(spec)
    kind = resolve_projection(spec)
    for set_name in ("train", "learn"):
        stored = rows_of(store, set_name)
        assert list(stored) == [group.name for group in made]
        gradients = gradients_of(spec, examples_of(store, set_name))
        for group in made:
            want = np.stack([expected(group, row, kind, spec.run.seed) for row in gradients])
            found = expanded(stored[group.name].astype(np.float64), group, kind)
            # Best factors are stable up to the gap between two singular values.
            tolerance = 1e-2 if projection["kind"] == "lorif" else 1e-4
            assert np.abs(found - want).max() <= tolerance * np.abs(want).max(), group.name


def test_kernels_and_norms_of_factors_are_those_of_the_matrices_that_they_stand_for(
    tiny_run: Path, tmp_path: Path
) -> None:
    projection = {"kind": "lorif", "rank": 3, "factors": 3}
    spec = run_of(tiny_run, tmp_path, {"features": {"projection": projection, "dtype": "float32"}})
    # Three factors of a matrix of rank three lose nothing.
    whole = run_of(
        tiny_run, tmp_path / "whole", {"features": {"projection": {"kind": "logra", "rank": 3}, "dtype": "float32"}}
    )

    stores = [featurized(spec), featurized(whole)]
    for item in (spec, whole):
        build_kernel(item, InThisProcess(), Progress(quiet=True))  # type: ignore[arg-type]

    from gradstore.store.artifacts import KernelArtifact

    found, wanted = (KernelArtifact.open(store.storage, "block", "m0") for store in stores)
    for group in wanted.settings["widths"]:
        np.testing.assert_allclose(
            found.read(group)[0], wanted.read(group)[0], rtol=1e-3, atol=1e-3 * wanted.read(group)[0].max()
        )
    norms = [store.open_set("train").read_examples(["gradient_norm"])["gradient_norm"].to_numpy() for store in stores]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    sums = [store.open_set("train").read_statistics()["sum_squares"].to_numpy() for store in stores]
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-4)


PCA = {"features": {"projection": {"kind": "logra", "rank": 4, "matrices": "pca", "pca_rows": 12}, "dtype": "float32"}}


def test_principal_components_are_the_top_eigenvectors_of_what_the_first_examples_show(
    tiny_run: Path, tmp_path: Path
) -> None:
    spec = run_of(tiny_run, tmp_path, PCA)

    store = featurized(spec)

    adapter, model, groups = model_of(spec)
    components = read_components(spec)
    assert components is not None
    group = groups[3]
    (part,) = group.parts
    module = model.get_submodule(part.parameter.removesuffix(".weight"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: seen.append((args[0][0].detach(), gradient[0])))  # type: ignore[no-untyped-call]

    module.register_forward_hook(watch)
    for example in examples_of(store, "train")[:12]:
        adapter.outputs(model, [example]).sum().backward()  # type: ignore[no-untyped-call]
    moments = [sum((d.T @ d).double() for _, d in seen), sum((x[:-1].T @ x[:-1]).double() for x, _ in seen)]
    for matrix, moment in zip(components[part.key], moments, strict=True):
        values = np.linalg.eigvalsh(moment.numpy())[::-1][:4]  # type: ignore[union-attr]
        found = matrix.double().numpy()
        np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(found @ moment.numpy() @ found.T, np.diag(values), rtol=1e-3, atol=1e-4 * values[0])  # type: ignore[union-attr]
        assert (found[np.arange(4), np.abs(found).argmax(1)] > 0).all()
    stored = rows_of(store, "learn")[group.name]
    pair = [matrix.numpy() for matrix in components[part.key]]
    gradients = gradients_of(spec, examples_of(store, "learn"))
    want = np.stack([oracle.project_two_sided(row[part.parameter], *pair) for row in gradients])
    np.testing.assert_allclose(stored, want, atol=1e-4 * np.abs(want).max())


def test_a_second_run_takes_the_components_that_are_there_and_other_examples_are_refused(
    tiny_run: Path, tmp_path: Path
) -> None:
    spec = run_of(tiny_run, tmp_path, PCA)
    first = featurized(spec).contract["projection"]["components"]

    assert featurized(spec).contract["projection"]["components"] == first
    changed = spec.model_copy(update={"run": spec.run.model_copy(update={"seed": 9})})
    with pytest.raises(ContractError, match=r"projections/components"):
        featurized(changed)


def test_components_of_a_model_that_has_changed_since_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    spec = run_of(tiny_run, tmp_path, PCA)
    featurized(spec)
    folder = tmp_path / "changed"
    shutil.copytree(spec.model.source, folder)
    _, model, _ = model_of(spec)
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    model.save_pretrained(folder)  # type: ignore[operator]
    changed = spec.model_copy(update={"model": spec.model.model_copy(update={"source": str(folder)})})

    with pytest.raises(ContractError, match=r"projections/components"):
        featurized(changed)


def trained(spec: RunSpec, file: Path, *, named: bool, groups: int = 1) -> dict[str, torch.Tensor]:
    """Save the state of AdamW after three steps; return sqrt(v / (1 - beta_2^t)) + epsilon by parameter."""
    _, model, _ = model_of(spec)
    parameters = list(model.named_parameters())
    given = [parameters[index::groups] for index in range(groups)]
    optimizer = torch.optim.AdamW(
        [{"params": part if named else [tensor for _, tensor in part]} for part in given], betas=(0.9, 0.95), eps=1e-6
    )
    tokens = torch.arange(20).reshape(2, 10)
    for step in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens + step).logits.logsumexp(-1).sum().backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), file)
    return {
        name: (optimizer.state[tensor]["exp_avg_sq"] / (1 - 0.95**3)).sqrt() + 1e-6
        for name, tensor in parameters
        if tensor in optimizer.state
    }


@pytest.mark.parametrize(("named", "groups"), [(True, 2), (False, 1)])
def test_with_an_optimizer_training_features_are_of_adams_direction_and_those_of_queries_of_the_gradient(
    tiny_run: Path, tmp_path: Path, named: bool, groups: int
) -> None:
    plain = run_of(tiny_run, tmp_path, {})
    divisors = trained(plain, tmp_path / "optimizer.pt", named=named, groups=groups)
    spec = run_of(
        tiny_run,
        tmp_path,
        {
            "model": {"precision": "float32", "optimizer": str(tmp_path / "optimizer.pt")},
            "features": {"dtype": "float32"},
        },
    )

    store = featurized(spec)

    _, _, made = model_of(spec)
    kind = resolve_projection(spec)
    for set_name in ("train", "eval"):
        stored = rows_of(store, set_name)
        for row, gradient in enumerate(gradients_of(spec, examples_of(store, set_name))):
            for group in made:
                (part,) = group.parts
                if set_name == "train":
                    gradient[part.parameter] = gradient[part.parameter] / divisors[part.parameter].double().numpy()
                want = expected(group, gradient, kind, spec.run.seed)
                np.testing.assert_allclose(stored[group.name][row], want, atol=2e-4 * np.abs(want).max())
    assert "optimizer" in store.contract["members"]["m0"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("unnamed groups", DataError, r"model.optimizer: .* has 2 groups of .* parameters without names"),
        ("sgd", DataError, r"has no betas and eps, so it is of another optimizer than Adam"),
        ("untrained", DataError, r"has stepped no parameter yet"),
        ("weights", DataError, r"holds .*, not an optimizer's state"),
        ("absent", SpecError, r"there is no such file"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_before_anything_is_written(
    tiny_run: Path, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "optimizer.pt"
    plain = run_of(tiny_run, tmp_path, {})
    _, model, _ = model_of(plain)
    if change == "unnamed groups":
        trained(plain, file, named=False, groups=2)
    elif change == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
        optimizer.step()
        torch.save(optimizer.state_dict(), file)
    elif change == "untrained":
        torch.save(torch.optim.AdamW(model.parameters()).state_dict(), file)
    elif change == "weights":
        torch.save(model.state_dict(), file)
    spec = run_of(tiny_run, tmp_path, {"model": {"optimizer": str(file)}})

    with pytest.raises(error, match=message):
        featurized(spec)

    assert not (tmp_path / "store").exists() or not any((tmp_path / "store").rglob("*"))
