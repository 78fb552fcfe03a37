"""What every train row counts in C, and every query: eta, what the output function asks for, and normalisation."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gradstore.cluster import Engine
from gradstore.errors import DataError
from gradstore.plan.combinations import DAS, refuse_combinations
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.self_influence import needs_self_influence
from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import self_influence
from gradstore.store.artifacts import QueryArtifact, SelfInfluenceArtifact
from gradstore.store.features import FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.scores import Transform

# Rows that an error names.
_MOST_NAMED = 5
# Rows of chunks of self-influence that a process keeps: those of the blocks that it is at, of every damping and member.
_KEPT = 64


def score_transform(output: str) -> Transform:
    """What becomes of scores under an output function: DAS squares them (arXiv 2506.05647, eq. 16)."""
    return "square" if output == DAS else "none"


def prepare_rows(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Make sure, before any row of C is built, that every row has a factor: of all of a sweep.

    Self-influence that is missing is computed, which is a pass over the features.

    Raises
    ------
    SpecError
        If the kernel or the normalisation is not defined for the output function.
    DataError
        If a leverage is 1 or more, naming its row.
    """
    store = FeatureStore.open(spec.run.store)
    output = _output(store)
    refuse_combinations(spec, output)
    if not needs_self_influence(spec, output):
        return
    self_influence(spec, engine, progress)
    if output == DAS:
        for swept in spec.sweep():
            for member in store.open_set("train").info.members:
                _refuse_leverage(store, swept, member)


def row_factor(store: FeatureStore, spec: RunSpec, train: FeatureSet, block: int) -> np.ndarray:
    r"""What a member's C of a block counts, float32 [n]; NaN where a row that is not valid has none.

    .. math:: \eta_e \; (1 - p_n) \; \frac{r_n}{1 - h_n} \; \tau(n, n)^{-1/2}

    of which 1 - p_n counts where features are those of a margin, whose gradient it turns into minus that of the loss
    (TRAK's matrix Q, arXiv 2303.14186); r_n / (1 - h_n) in DAS; and the last where C is normalised.

    Parameters
    ----------
    store, spec
        The store, and one run of a sweep.
    train
        The train set as the member has it.
    block
        The block.
    """
    from gradstore.numerics.normalization import left_out_factors, row_factors

    factor_N = spec.model.etas[train.member] * _margin_factor(store, train, block)
    if _output(store) == DAS:
        residual_N = _column(train, "residual", block)
        factor_N = factor_N * left_out_factors(residual_N, _self_influence(store, spec, train, block))
    if spec.contribute.normalize != "none":
        self_N = np.zeros(len(factor_N))
        for member, eta in spec.model.etas.items():
            of_member = train.of_member(member)
            margin_N = _margin_factor(store, of_member, block)
            self_N += eta * margin_N**2 * _self_influence(store, spec, of_member, block)
        factor_N = factor_N * row_factors(spec.contribute.normalize, self_N)
    return factor_N.astype(np.float32)


def query_factor(store: FeatureStore, spec: RunSpec, set_name: str) -> np.ndarray | None:
    """What C of every query counts, float32 [Q]: 1 / sqrt(tau(q, q)) for the cosine. None where all count once."""
    from gradstore.numerics.normalization import query_factors

    if spec.contribute.normalize != "cosine":
        return None
    selves = [
        eta * QueryArtifact.open(store.storage, spec.kernel.name, (set_name, member)).read_self().sum(1)
        for member, eta in spec.model.etas.items()
    ]
    return np.asarray(query_factors("cosine", np.sum(selves, 0)).astype(np.float32))


def _output(store: FeatureStore) -> str:
    return str(store.contract["model"].get("output"))


def _margin_factor(store: FeatureStore, train: FeatureSet, block: int) -> np.ndarray:
    """1 - p_n where features are those of a margin, else 1: float64 [n]."""
    start, stop = train.info.block_range(block)
    return 1 - _column(train, "p", block) if _output(store) == MARGIN else np.ones(stop - start)


def _self_influence(store: FeatureStore, spec: RunSpec, train: FeatureSet, block: int) -> np.ndarray:
    """tau(n, n) of a member's rows over all groups, float64 [n]; under the identity the squared norm of the gradient."""
    if not resolve_kernel(spec).needs_spectra:
        return np.asarray(_column(train, "gradient_norm", block) ** 2)
    artifact = SelfInfluenceArtifact.open(store.storage, spec.kernel.name, train.member)
    start, stop = train.info.block_range(block)
    row, within = divmod(start, artifact.shape.chunk_rows)
    total_N = _totals(store.storage.url, spec.kernel.name, train.member, artifact.info.commits, row)
    return np.asarray(total_N[within : within + stop - start])


@lru_cache(maxsize=_KEPT)
def _totals(store_url: str, kernel: str, member: str, commits: str, row: int) -> np.ndarray:
    """Self-influence over all groups of a row of chunks; ``commits`` tells apart artifacts that were made anew."""
    del commits
    return SelfInfluenceArtifact.open(FeatureStore.open(store_url).storage, kernel, member).read_totals(row)


def _column(train: FeatureSet, name: str, block: int) -> np.ndarray:
    """A column of the example table, float64 [n]; NaN where it is null: of erased rows."""
    return np.asarray(train.read_examples([name], block=block)[name].to_numpy(), np.float64)


def _refuse_leverage(store: FeatureStore, spec: RunSpec, member: str) -> None:
    from gradstore.numerics.normalization import beyond

    artifact = SelfInfluenceArtifact.open(store.storage, spec.kernel.name, member)
    leverage_N = np.concatenate([artifact.read_totals(row) for row in range(artifact.shape.num_rows)])
    rows = np.flatnonzero(beyond(leverage_N)).tolist()
    if not rows:
        return
    shown = ", ".join(map(str, rows[:_MOST_NAMED])) + (
        f" and {len(rows) - _MOST_NAMED:,} more" if len(rows) > _MOST_NAMED else ""
    )
    kernel, way_out = artifact.settings["kernel"], "Raise"
    if kernel["kind"] == "block":
        way_out = 'Leverages of single groups add up under a block kernel: set kernel.kind = "full", or raise'
    elif kernel.get("route") == "low_rank":
        # What a truncated kernel does not capture of a row counts |phi|^2 / lambda.
        way_out = (
            'A kernel of low rank bounds no leverage: set kernel.route = "primal" or "dual", or raise kernel.rank or'
        )
    raise DataError(
        f"{artifact.folder}: train rows {shown} have a leverage h_n of 1 or more (the largest {np.nanmax(leverage_N):.3g}), "
        f"and DAS divides by 1 - h_n. {way_out} kernel.damping (with another kernel.name)."
    )
