"""Weights that the stage learns of stores of random features, and what the store keeps of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from gradstore.cluster import Engine
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.contributing import make_spec
from tests.runs import InThisProcess

LEARN = {"k": 3, "epochs": 4, "learning_rate": 0.3}


def learned(
    store: FeatureStore, name: str, tables: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> WeightsArtifact:
    """The weights of a store whose contributions are there."""
    spec = make_spec(store, **{**(tables or {}), "learn": {**LEARN, "name": name, **settings}})
    learn(spec, cast(Engine, InThisProcess()), Progress())
    return WeightsArtifact.open(store.storage, name)


def weights_of(
    store: FeatureStore, name: str, tables: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    """The same as numbers, and what the record says of them."""
    artifact = learned(store, name, tables, **settings)
    return artifact.read()["weight"].to_numpy(), dict(artifact.log.require(0, "not written").facts)
