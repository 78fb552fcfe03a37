"""Embeddings of train examples and queries, computed by workers and kept, and the similarity of the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.adapters.embedding import Embeds, encode_sentences
from gradstore.cluster import Engine, Task
from gradstore.errors import DataError
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec, content_hash
from gradstore.stages.loading import load_for
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import EmbeddingsArtifact
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureSet, FeatureStore

if TYPE_CHECKING:
    from torch import Tensor

_BATCH: Final = 16
_HASH_DIGITS: Final = 16


def has_embeddings(spec: RunSpec) -> bool:
    """Whether a run's examples have embeddings: by a sentence encoder that it names, or by a model that gives some."""
    return spec.evaluate.encoder is not None or isinstance(make_adapter(spec), Embeds)


def embedding_settings(spec: RunSpec, store: FeatureStore) -> dict[str, Any]:
    """What embeddings are made by."""
    if spec.evaluate.encoder is not None:
        return {"encoder": spec.evaluate.encoder}
    return {"model": dict(store.contract["members"][[*spec.model.etas][-1]])}


def similarities(
    spec: RunSpec, store: FeatureStore, engine: Engine, progress: Progress, *, of: str = "eval"
) -> np.ndarray:
    """Cosine similarity [Q, rows] of the embeddings of every query of a set and train row; NaN where there is no example.

    Those that the store does not have are computed and kept.

    Raises
    ------
    DataError
        If an embedding is not finite.
    """
    train, queries = (_unit_rows(spec, store, name, engine, progress) for name in ("train", of))
    return np.asarray(queries @ train.T)


def _unit_rows(spec: RunSpec, store: FeatureStore, set_name: str, engine: Engine, progress: Progress) -> np.ndarray:
    """Embeddings of a set of length 1, float32 [rows, width]; NaN in gaps."""
    artifact = _artifact(spec, store, set_name)
    missing = artifact.missing_units()
    feature_set = store.open_set(set_name)
    tasks = [
        Task(
            name=f"embed-{set_name}-{block:08d}",
            function=embed_block,
            arguments=(spec.run.store, spec.model_dump(), set_name, block),
            resources=spec.cluster.model_resources,
        )
        for block in missing
    ]
    if tasks:
        total = feature_set.info.num_blocks
        with progress.stage(f"embed {set_name}", total, "blocks", total - len(tasks)) as advance:
            for _ in engine.run(tasks):
                advance(1)
    rows_N, embedded = artifact.read()
    found = np.full((feature_set.info.rows, embedded.shape[1]), np.nan, np.float32)
    # Of a zero vector nothing is similar to anything.
    found[rows_N] = embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return found


def embed_block(store_url: str, run: Mapping[str, Any], set_name: str, block: int) -> None:
    """Task: the embeddings of the examples of a block, committed.

    Raises
    ------
    DataError
        If one is not finite.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    artifact, feature_set = _artifact(spec, store, set_name), store.open_set(set_name)
    rows, examples = _examples(feature_set, block)
    order = sorted(range(len(examples)), key=lambda place: examples[place].size)
    found: dict[int, np.ndarray] = {}
    for first in range(0, len(order), _BATCH):
        places = order[first : first + _BATCH]
        embedded = _embedded(spec, store, [examples[place] for place in places])
        found |= dict(zip(places, embedded.float().cpu().numpy(), strict=True))
    stacked = np.stack([found[place] for place in range(len(examples))])
    if not np.isfinite(stacked).all():
        row = rows[int(np.flatnonzero(~np.isfinite(stacked).all(1))[0])]
        raise DataError(
            f'{set_name}: the embedding of row {row} is not finite. Leave "embedding" out of evaluate.baselines.'
        )
    artifact.write_block(block, rows, stacked, facts={"examples": len(examples)})


def _embedded(spec: RunSpec, store: FeatureStore, examples: Sequence[Example]) -> Tensor:
    if spec.evaluate.encoder is not None:
        return encode_sentences(spec.evaluate.encoder, [example.text for example in examples], resolve_device(spec))
    loaded = load_for(store, spec)
    assert isinstance(loaded.adapter, Embeds), "others have no embeddings"
    return loaded.adapter.embeddings(loaded.model, examples)


def _examples(feature_set: FeatureSet, block: int) -> tuple[np.ndarray, list[Example]]:
    """Numbers of the rows of a block that are examples still, and these."""
    start, stop = feature_set.info.block_range(block)
    rows = np.array([row for row in range(start, stop) if row not in feature_set.info.erased], np.int64)
    table = feature_set.read_inputs(block).take(rows - start).combine_chunks()
    return rows, from_table(table)


def _artifact(spec: RunSpec, store: FeatureStore, set_name: str) -> EmbeddingsArtifact:
    made_by = embedding_settings(spec, store)
    name = "model" if spec.evaluate.encoder is None else f"encoder-{content_hash(made_by)[:_HASH_DIGITS]}"
    return EmbeddingsArtifact.create(
        store.storage,
        name,
        set_name,
        settings={**made_by, "of": store.describe(set_name)},
        blocks=store.open_set(set_name).info.num_blocks,
    )
