"""The task that computes and commits blocks of a feature set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import DataError
from gradstore.spec import RunSpec
from gradstore.stages.featurize.batches import Source, compute
from gradstore.stages.featurize.planted import find_planted
from gradstore.stages.featurize.tables import DAS, Outputs, Statistics, example_table
from gradstore.stages.featurize.writer import BackgroundWriter
from gradstore.stages.loading import load_for
from gradstore.store.commits import Record
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureSet, FeatureStore, blanked

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block as it was computed, ready to be written."""

    features: Mapping[str, np.ndarray]
    examples: pa.Table
    statistics: pa.Table
    facts: Mapping[str, Any]


def featurize_blocks(
    store_url: str, run: Mapping[str, Any], place: tuple[str, str], blocks: Sequence[int]
) -> dict[str, int]:
    """Task: compute and commit some blocks of a (set, member), each written while the next is computed.

    Returns how many values float16 could not hold, and how many rows are not valid.
    """
    spec = RunSpec.model_validate(run)
    store = FeatureStore.open(store_url)
    feature_set = store.open_set(*place)
    source = find_planted(spec, feature_set) or load_for(store, spec, feature_set.member)
    # Of the contract: an adapter may have to read the dataset to say it, which workers need not reach.
    output = str(store.contract["model"]["output"])
    with BackgroundWriter[Record]() as writer:
        for block in blocks:
            if not feature_set.begin(block):
                continue
            computed = _compute_block(feature_set, source, spec, block, output=output)
            writer.submit(
                partial(
                    feature_set.write_block,
                    block,
                    computed.features,
                    examples=computed.examples,
                    statistics=computed.statistics,
                    facts=computed.facts,
                )
            )
    return {
        "saturated": sum(int(record.facts["saturated"]) for record in writer.results),
        "invalid": sum(int(record.facts["nan_rows"]) for record in writer.results),
    }


def _compute_block(feature_set: FeatureSet, source: Source, spec: RunSpec, block: int, *, output: str) -> Block:
    started = time.monotonic()
    info = feature_set.info
    examples = from_table(feature_set.read_inputs(block))
    start, stop = info.block_range(block)
    features = {array.name: np.empty((stop - start, array.features), np.float32) for array in info.arrays}
    outputs, statistics = np.full(stop - start, np.nan), Statistics(info)
    residuals = np.full(stop - start, np.nan) if output == DAS else None
    invalid: dict[int, str] = {}
    training = info.name == "train"
    # Only the kernel is built from covariances, and only from those of the train set.
    covariances = training and spec.features.covariances
    budget = int(info.recorded["token_budget"])
    erased = info.erased_in(block)
    left = [row for row in range(len(examples)) if row not in erased]
    present = [examples[row] for row in left]
    for found in compute(source, present, budget, training=training, covariances=covariances):
        rows = [left[row] for row in found.rows]
        outputs[rows] = found.batch.outputs
        if residuals is not None:
            assert found.batch.residuals is not None, "an adapter with the output function of DAS tells residuals"
            residuals[rows] = found.batch.residuals
        for name, values in found.batch.features.items():
            features[name][rows] = values
        if found.invalid:
            invalid |= {left[row]: what for row, what in found.invalid.items()}
        else:
            statistics.add(found.batch)
    refuse_invalid(examples, invalid, spec.features.max_invalid * info.num_examples)
    for values in features.values():
        values[[*invalid, *erased]] = np.nan
    said = Outputs(function=output, values=outputs, residuals=residuals)
    table = example_table(start, examples, said, features, arrays=info.arrays)
    return Block(
        features=features,
        examples=blanked(table, erased) if erased else table,
        statistics=statistics.table(features),
        facts={"seconds": time.monotonic() - started, **source.facts()},
    )


def refuse_invalid(examples: Sequence[Example], invalid: Mapping[int, str], limit: float) -> None:
    """Refuse a block whose rows that are not valid are more than the whole set may have; nothing of it is written.

    Raises
    ------
    DataError
        Naming the first of them.
    """
    if len(invalid) <= limit:
        return
    shown = "; ".join(f"{examples[row].example_id}: {what}" for row, what in sorted(invalid.items())[:3])
    raise DataError(
        f"{shown}. {len(invalid):,} examples of one block are not finite, features.max_invalid allows {int(limit):,} of "
        'the set. Remove them, set model.precision = "float32", mend the model, or raise features.max_invalid.'
    )
