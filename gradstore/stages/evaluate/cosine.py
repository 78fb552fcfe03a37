"""The cosine of gradients: similarity of what the model would learn from two examples, without any kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, cast

from gradstore.cluster import Engine
from gradstore.cluster.here import Here
from gradstore.errors import SpecError
from gradstore.plan.combinations import refuse_combinations
from gradstore.spec import RunSpec
from gradstore.spec.sections import ContributeSection, KernelSection
from gradstore.stages.building import BuiltContributions
from gradstore.stages.contribute.artifacts import create_queries
from gradstore.stages.contribute.queries import precondition
from gradstore.stages.contribute.rows import prepare_rows
from gradstore.stages.evaluate.over import over_store
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import FromContributions, Method, Ranks, Scored
from gradstore.stages.weights import UNWEIGHTED

COSINE: Final = Method(name="cosine")
_KERNEL: Final = KernelSection(name="cosine", kind="identity")
_METHOD: Final = Method(name=UNWEIGHTED, kernel=_KERNEL.name)


@contextmanager
def cosine_source(spec: RunSpec, progress: Progress) -> Iterator[CosineSource]:
    r"""Enter with the cosine of the features of every train row and eval query, over all groups.

    .. math:: \frac{\sum_j \phi_j(n) \cdot \psi_j(q)}{\lVert \phi(n) \rVert \, \lVert \psi(q) \rVert}

    It is built of features as they stream by, in memory over the store: every use is a pass over them.
    """
    with over_store(_by_cosine(spec)) as (over, store):
        prepare_rows(over, cast(Engine, Here()), progress)
        for member in store.open_set("eval").info.members:
            create_queries(over, store, ("eval", member))
            precondition(over.run.store, over.model_dump(), ("eval", member))
        yield CosineSource(FromContributions(store, BuiltContributions.open(over, store, "eval")))


def _by_cosine(spec: RunSpec) -> RunSpec:
    contribute = ContributeSection(mode="streamed", normalize="cosine")
    return spec.model_copy(update={"kernel": _KERNEL, "contribute": contribute})


class CosineSource:
    """Ranks and scores by the cosine of gradients; see `cosine_source`."""

    def __init__(self, source: FromContributions) -> None:
        self._source = source

    def rank(self, keep: int, progress: Progress) -> Ranks:
        """Rank the valid rows for every query."""
        return Ranks(proponents=self._source.rank([_METHOD], keep, progress)[_METHOD].proponents)

    def scan(self, progress: Progress, stage: str) -> Iterator[Scored]:
        """Yield pieces of the cosines: every valid row of every query once."""
        for piece in self._source.scan([_METHOD], progress, stage):
            yield replace(piece, scores={COSINE: piece.scores[_METHOD]}, parts=None)


def has_cosine(spec: RunSpec, output: str | None) -> bool:
    """Whether cosines have a meaning for the output function and the members of a run."""
    try:
        refuse_combinations(_by_cosine(spec), output)
    except SpecError:
        return False
    return True
