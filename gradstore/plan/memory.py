"""How much memory one task of a stage takes at its highest, and the process that runs the command.

Every figure is a sum of what is alive at once, so it can be checked against the code; the constants are measured, and
tests/memory runs the tasks and compares. Bytes are those of a worker's process on a CPU; on a GPU, where weights and
activations are on the device, they bound host and device alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gradstore.plan.contribute import READ_BYTES
from gradstore.plan.contributions import ContributePlan, coefficient_bytes, span_bytes
from gradstore.plan.full import full_influence_bytes
from gradstore.plan.kernels import spectra_bytes, task_bytes
from gradstore.plan.resolve import ModelShape
from gradstore.plan.sizes import (
    AUTO_TOKEN_BUDGET,
    LEARNER_BUFFERS,
    RANKED_ROWS,
    SetPlan,
    Widths,
    certifies,
    learner_tile,
    query_tile,
    row_scale_bytes,
    verified_queries,
    weightings,
)
from gradstore.spec import RunSpec

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Kernel

# Python, torch, transformers, pyarrow, zarr, distributed and the code of a model, as resident memory: 520 to 795 MiB once
# SmolLM2-135M is loaded and none of its weights has been touched. It is mostly pages of shared libraries, of which a
# kernel maps more or fewer around each that is used; 65 MiB more where a whole task runs. Linux, torch 2.
PROCESS_BYTES: Final = 900 * 2**20
# Outputs of layers that one token keeps alive until the backward pass has passed them, in units of all groups' outputs:
# residuals, norms and activations come on top of the outputs, of which some are not kept. SmolLM2-135M takes 2.5 in
# float32 and 2.6 in bfloat16.
LAYER_OUTPUTS: Final = 2.75
# The same in units of the outputs of all modules, where those were counted; the patches of a convolution come on top.
COUNTED_OUTPUTS: Final = 1.5
# Float32 pieces of the cross-entropy and their exponentials (numerics/outputs/tokens.py).
LOSS_BYTES: Final = 3 * 16 * 2**20
# AdamW's two moments of one tensor and its two temporaries; the first to be stepped meets the gradients of all.
STEP_TENSORS: Final = 4
# Chunks that one process reads or writes at the same time, as store/backend has them: on a directory, and elsewhere.
CHUNKS_AT_ONCE: Final = (4, 16)
# Blocks whose rows' scales are held: those kept for reading (store/features/chunks.py), and one being written, twice.
BLOCKS_OF_SCALES: Final = 6
# A chunk of self-influence under one damping, in float64 and as it is stored.
INFLUENCE_BYTES: Final = 2**20
# Scores of a query that are held at least where weights are judged (numerics/learner/judging.py).
LEAST_JUDGED: Final = 1024
# Text, words and BM25 index of one token of the corpus.
TEXT_BYTES: Final = 40


class TaskMemory:
    """Peak memory of one task of every stage, and of the process that runs the command, in bytes.

    Parameters
    ----------
    spec
        The run.
    model
        Names and shapes of the model.
    widths
        Features of every group.
    """

    def __init__(self, spec: RunSpec, model: ModelShape, widths: Widths) -> None:
        self._spec = spec
        self._model = model
        self._groups = model.partition.groups
        self._of_groups = widths
        self._widths = widths.stored
        self._full = widths.full
        self._components = widths.components
        self._features = sum(widths.stored)
        self._weights = 4 * model.partition.total_parameters
        self._at_once = CHUNKS_AT_ONCE["://" in spec.run.store]

    def featurize(self, sets: Sequence[SetPlan]) -> int:
        """Weights, what the tokens of one batch keep alive, and the features of two blocks.

        Features are held as the last batch's, the block's, and the last block's while it is written; norms take one group
        in float64, and covariances as much as two squares of every side of a group's features. Of rank-c factors the whole
        matrices are held too, of the last batch, and of one group for its norms.
        """
        tokens = self._tokens(sets)
        rows = max(planned.block_rows for planned in sets)
        block = 12 * rows * self._features + self._chunks(sets) + 8 * rows * max(self._full)
        block += 4 * rows * (sum(self._full) + max(self._full)) if self._full != self._widths else 0
        block += 32 * self._features if self._spec.features.covariances else 0
        projectors = sum(
            4 * math.isqrt(width) * (part.out_features + part.in_features)
            for group, width in zip(self._groups, self._widths, strict=True)
            for part in group.parts
        )
        computed = PROCESS_BYTES + projectors + block + self._largest_of(lambda item: self._pass(tokens, item))
        return max(computed, self._find_components(tokens))

    def kernel(self, train: SetPlan, kernel: Kernel) -> int:
        """What a bundle of groups sums up and makes of it (plan/kernels.py), and blocks of single groups, read ahead.

        A kernel of the mean of several members takes the sum of a group beside what is read; rank-c factors take their
        matrices, of one group, beside their own.
        """
        if not kernel.needs_spectra:
            return 0
        rows = (1 + self._at_once) * 4 * train.block_rows * max(self._widths)
        rows += 4 * train.block_rows * max(self._full) if self._spec.kernel.members == "mean" else 0
        rows += 4 * train.block_rows * max(self._full) if self._full != self._widths else 0
        return PROCESS_BYTES + self._weights + task_bytes(kernel, self._of_groups) + rows + self._chunks([train])

    def self_influence(self, train: SetPlan, kernel: Kernel, groups: int, dampings: int) -> int:
        """Spectra of as many consecutive groups, with rows that are rotated at once; and blocks of single groups, read ahead.

        Across groups it is what building the kernel takes, with features of one block, side by side, three times over.
        """
        if not kernel.needs_spectra:
            return PROCESS_BYTES + self._weights
        beside = self.kernel(train, kernel) - task_bytes(kernel, self._of_groups)
        beside += dampings * INFLUENCE_BYTES
        if kernel.across_groups:
            return beside + full_influence_bytes(self._spec, self._of_groups, train)
        return beside + spectra_bytes(kernel, self._of_groups, groups)

    def contribute(self, train: SetPlan, cut: ContributePlan, *, spectra: bool) -> int:
        """What a span holds (plan/contributions.py), with the bundle of groups that is worked on and the one read ahead.

        Queries are preconditioned in tasks of their own, before.
        """
        span = span_bytes(self._spec, cut, self._of_groups, train) + self._read_features(train)
        before = self._precondition([shape.queries for shape in cut.queries.values()], spectra=spectra)
        if cut.route is not None:
            before = coefficient_bytes(self._spec, cut, self._of_groups, train) + self._chunks([train])
        return PROCESS_BYTES + self._weights + max(span, before)

    def patch(self, train: SetPlan) -> int:
        """Weights, a copy to restore them from, their gradients, the step of the largest tensor, and one batch's tokens."""
        largest = STEP_TENSORS * 4 * self._model.largest_tensor
        tokens = self._spec.score.tail_patch.k * train.length
        return PROCESS_BYTES + 2 * self._weights + largest + self._largest_of(lambda item: self._pass(tokens, item))

    def learn(self, train: SetPlan, queries: SetPlan, built: ContributePlan | None) -> int:
        """What certifying takes, and what streaming takes, to which it may come: the more; with C as it is read or built.

        To certify, A_q and rows of a span, beside those of all, and weights of every step of each candidate; to stream, C of a
        tile; to choose, the best scores of the held-out queries under all candidates. ``built`` is how C is, if not kept.
        """
        learn, groups = self._spec.learn, len(self._groups)
        steps = learn.epochs * queries.rows
        tile = learner_tile((queries.rows, train.rows, groups))
        streamed = 4 * tile * train.rows * groups + 200 * steps
        sums = 2 * 8 * queries.rows * groups**2
        # No more than the whole of C, each row with its number.
        kept = min(learn.memory_bytes, queries.rows * train.rows * (4 * groups + 8))
        certified = sums + 2 * kept + learn.num_candidates * steps * (24 * groups + 200)
        held_out = math.ceil(learn.share_held_out * queries.rows)
        judged = 16 * max(*learn.ks, LEAST_JUDGED) * held_out * (learn.num_candidates + 1)
        falls_back = learn.solver == "algorithm_1"
        most = max(certified if certifies(self._spec) else 0, streamed if falls_back else certified, judged)
        return PROCESS_BYTES + most + self._pieces(train, queries, built)

    def rank(self, train: SetPlan, queries: SetPlan, built: ContributePlan | None, *, texts: bool) -> int:
        """C as it is read or built, one piece of it also in float64, what is kept of it for rankings of two sides, and texts.

        Scores are C of one group, of all queries. Texts, for BM25, are those of both sets.
        """
        groups, alone = len(self._groups), self._spec.contribute.mode == "scores"
        size = self._at_a_time(train, queries) if built is None else built.pass_rows
        block = size * train.block_rows * (8 * groups + 40) + self._pieces(train, queries, built)
        if alone:
            block = queries.rows * train.block_rows * 56
        # Rows so far, those of a block beside them, and both together.
        kept = 3 * self.ranked_bytes(train, queries, 1 if alone else groups)
        tokens = train.rows * train.length + queries.rows * queries.length
        return PROCESS_BYTES + block + kept + (TEXT_BYTES * tokens if texts else 0)

    def matrices(self, train: SetPlan, queries: SetPlan) -> int:
        """Two pieces of C, one also in float64; a block's scores of all queries under all weightings, and one as it is written."""
        groups, methods = len(self._groups), weightings(self._spec)
        piece = self._at_a_time(train, queries) * train.block_rows
        return PROCESS_BYTES + piece * (16 * groups + 8 * methods) + 4 * queries.rows * train.block_rows * (methods + 2)

    def _at_a_time(self, train: SetPlan, queries: SetPlan) -> int:
        """Queries whose C, of one block, is read at once where it is kept."""
        groups = len(self._groups)
        tile = query_tile((queries.rows, train.rows, groups), train.block_rows, self._spec.contribute.dtype)
        return verified_queries((queries.rows, groups), train.block_rows, tile)

    def _pieces(self, train: SetPlan, queries: SetPlan, built: ContributePlan | None) -> int:
        """Two pieces of C that is read; of C that is built, what a task of contribute takes for it beside its process."""
        if built is None:
            return LEARNER_BUFFERS * 4 * self._at_a_time(train, queries) * train.block_rows * len(self._groups)
        return span_bytes(self._spec, built, self._of_groups, train) + self._read_features(train)

    def ranked_bytes(self, train: SetPlan, queries: SetPlan, parts: int) -> int:
        """Rows, scores and parts of every query, under all weightings and on two sides; and of the two baselines."""
        kept = min(max(self._spec.score.k, RANKED_ROWS), train.rows)
        return queries.rows * kept * (weightings(self._spec) * 2 * (4 * parts + 40) + 2 * 40)

    def _read_features(self, train: SetPlan) -> int:
        """Two bundles of groups of a block, one of them read ahead, and chunks as they are read."""
        widest = 4 * train.block_rows * max(self._full)
        read = 2 * min(READ_BYTES + widest, 4 * train.block_rows * sum(self._full))
        return read + self._chunks([train])

    def _precondition(self, queries: Sequence[int], *, spectra: bool) -> int:
        """All groups of one set, before it is written, and the spectrum, if there is one, and rotated queries of one group."""
        most, widest = max(queries), max(self._full)
        return 4 * most * sum(self._full) + (8 * widest**2 if spectra else 0) + 24 * most * widest

    def _tokens(self, sets: Sequence[SetPlan]) -> int:
        """Tokens of the largest batch."""
        asked = self._spec.features.token_budget
        return max(AUTO_TOKEN_BUDGET if asked == "auto" else asked, *(planned.length for planned in sets))

    def _find_components(self, tokens: int) -> int:
        """Second moments of one bundle of parts, one of them as a batch adds it, whole factors, and a decomposition."""
        if self._components is None:
            return 0
        sides = sum(part.out_features + part.in_features for group in self._groups for part in group.parts)
        decomposed = 32 * self._components.longest_side**2
        found = self._components.moment_bytes + decomposed + 4 * tokens * sides
        return PROCESS_BYTES + found + self._largest_of(lambda item: self._pass(tokens, item))

    def _pass(self, tokens: int, item: int) -> int:
        """Weights, their rounded copies under autocast, and what every token keeps alive: layers and two sets of logits."""
        layers = sum(part.out_features for group in self._groups for part in group.parts)
        layers += sum(map(math.isqrt, self._widths))
        alive = LAYER_OUTPUTS * layers if self._model.activations is None else COUNTED_OUTPUTS * self._model.activations
        a_token = item * (alive + 2 * self._model.outputs)
        rounded = self._weights // 2 if item == 2 else 0
        return self._weights + rounded + int(tokens * a_token) + LOSS_BYTES

    def _largest_of(self, memory: Callable[[int], int]) -> int:
        """Memory by bytes a value takes in the run's precision; ``auto`` is decided on the worker, so the larger counts."""
        precision = self._spec.model.precision
        return max(memory(item) for item, name in ((4, "float32"), (2, "bfloat16")) if precision in (name, "auto"))

    def _chunks(self, sets: Sequence[SetPlan]) -> int:
        """Chunks that are read or written at the same time, compressed ones both as they are stored and before."""
        forms = 1 if all(planned.compression == "none" for planned in sets) else 2
        scales = sum(planned.block_rows * row_scale_bytes(planned.dtype, len(self._groups)) for planned in sets)
        return self._at_once * forms * max(planned.largest_chunk_bytes for planned in sets) + BLOCKS_OF_SCALES * scales
