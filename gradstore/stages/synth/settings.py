"""What `gradstore synth` is asked for, and the run.toml that says so."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gradstore.adapters.synthetic import SyntheticOptions

_TEMPLATE = """\
# Written by `gradstore synth`: a model without weights whose gradients are planted, so it is known what is to be found.
# planted.json beside this file says which groups are good, and which train rows contribute to each query.
# [kernel], [contribute], [learn], [score] and [cluster] may be changed; the rest says what is in the store.

[run]
name = "synth"
store = {store}
seed = {seed}

[model]
adapter = "synthetic"
source = "planted"
precision = "float32"

[model.options]
groups = {groups}
features = {features} # of each group
topics = {topics}
contributors = {contributors} # train rows of every query's own
noisy = {noisy} # share of the groups

[data]
source = "planted"

[data.train]
rows = {rows}

[data.learn]
rows = {learn_queries}

[data.eval]
rows = {queries}

[features]
projection = {{ kind = "logra", rank = {positions} }} # of the longer side, so that every gradient is kept as it is
dtype = {dtype}
{block_rows}token_budget = {token_budget}

[kernel]
kind = {kernel}

[learn]
k = {k}

[score]
k = 10

[score.tail_patch] # there is no model to step
queries = 0

[cluster]
device = "cpu"
memory_per_worker = {memory}
{workers}"""
# Numbers, and at most rows, of a group that are drawn at once: enough that a generator's making costs little.
NUMBERS_AT_ONCE = 2**17
MOST_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSettings:
    """The options of `gradstore synth`.

    Attributes
    ----------
    folder
        Where run.toml and planted.json are written.
    store
        The store; by default ``store`` in the folder.
    rows, queries, learn_queries
        Rows of train, eval and learn; there are as many learn queries as eval queries, unless told otherwise.
    groups, features
        Number of groups, and features of each.
    topics, contributors, noisy
        What is planted: see `gradstore.numerics.planted.Planting`.
    seed
        What everything is drawn from.
    dtype, block_rows
        As in [features].
    kernel
        The kind of kernel that run.toml names.
    workers, memory_per_worker
        As in [cluster].
    """

    folder: Path
    store: str | None
    rows: int
    queries: int
    learn_queries: int | None
    groups: int
    features: int
    topics: int
    contributors: int
    noisy: float
    seed: int
    dtype: str
    block_rows: int | None
    kernel: str
    workers: int | None
    memory_per_worker: str

    @property
    def run_toml(self) -> str:
        """The text of run.toml.

        Raises
        ------
        SpecError
            If the features of a group are no matrix.
        """
        positions = SyntheticOptions(groups=self.groups, features=self.features).shape[1]
        rows_at_once = max(1, min(MOST_ROWS_AT_ONCE, NUMBERS_AT_ONCE // self.features))
        return _TEMPLATE.format(
            store=json.dumps(self.store or str(self.folder.absolute() / "store")),
            seed=self.seed,
            groups=self.groups,
            features=self.features,
            topics=self.topics,
            contributors=self.contributors,
            noisy=self.noisy,
            rows=self.rows,
            queries=self.queries,
            learn_queries=self.queries if self.learn_queries is None else self.learn_queries,
            dtype=json.dumps(self.dtype),
            block_rows="" if self.block_rows is None else f"block_rows = {self.block_rows}\n",
            positions=positions,
            token_budget=rows_at_once * positions,
            kernel=json.dumps(self.kernel),
            k=min(10, self.rows),
            memory=json.dumps(self.memory_per_worker),
            workers="" if self.workers is None else f"workers = {self.workers}\n",
        )
