"""How much memory one task of a stage takes at its highest, and the process that runs the command.

Every figure is a sum of what is alive at once, so it can be checked against the code; the constants are measured, and
tests/memory runs the tasks and compares. Bytes are those of a worker's process on a CPU; on a GPU, where weights and
activations are on the device, they bound host and device alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from gradstore.plan.resolve import ModelShape
from gradstore.plan.sizes import ITEM_BYTES, RANKED_ROWS, SetPlan, kernel_bundles, split
from gradstore.spec import RunSpec

# Python, torch, transformers, pyarrow, zarr, distributed and the code of a model, as resident memory: 520 to 795 MiB once
# SmolLM2-135M is loaded and none of its weights has been touched. It is mostly pages of shared libraries, of which a
# kernel maps more or fewer around each that is used; 65 MiB more where a whole task runs. Linux, torch 2.
PROCESS_BYTES: Final = 900 * 2**20
# Outputs of layers that one token keeps alive until the backward pass has passed them, in units of all groups' outputs:
# residuals, norms and activations come on top of the outputs, of which some are not kept. SmolLM2-135M takes 2.5 in
# float32 and 2.6 in bfloat16.
LAYER_OUTPUTS: Final = 2.75
# Float32 pieces of the cross-entropy and their exponentials (numerics/outputs.py).
LOSS_BYTES: Final = 3 * 16 * 2**20
# AdamW's two moments of one tensor and its two temporaries; the first to be stepped meets the gradients of all.
STEP_TENSORS: Final = 4
# Chunks that one process reads or writes at the same time, as store/backend has them: on a directory, and elsewhere.
CHUNKS_AT_ONCE: Final = (4, 16)
# Train features that a task of contribute reads at a time (stages/contribute.py).
READ_BYTES: Final = 64 * 2**20
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
        k_j, the features of every group.
    """

    def __init__(self, spec: RunSpec, model: ModelShape, widths: Sequence[int]) -> None:
        self._spec = spec
        self._model = model
        self._groups = model.partition.groups
        self._widths = widths
        self._features = sum(widths)
        self._weights = 4 * model.partition.total_parameters

    def featurize(self, sets: Sequence[SetPlan]) -> int:
        """Weights, what the tokens of one batch keep alive, and the features of one block.

        Features are held twice, as the last batch's and the block's; norms take one group in float64.
        """
        tokens = max(self._spec.features.token_budget, *(planned.length for planned in sets))
        rows = max(planned.block_rows for planned in sets)
        block = 8 * rows * self._features + self._chunks(sets) + 8 * rows * max(self._widths)
        projectors = sum(
            4 * math.isqrt(width) * (group.out_features + group.in_features)
            for group, width in zip(self._groups, self._widths, strict=True)
        )
        return PROCESS_BYTES + projectors + block + self._largest_of(lambda item: self._pass(tokens, item))

    def kernel(self, train: SetPlan) -> int:
        """Gram matrices of one bundle, the decomposition of its widest group, and a block of its groups.

        LAPACK's syevd works on a copy, with two more as workspace, and numpy copies the result out: 32 d^2 bytes beside the
        matrix, and 4 d^2 for the eigenvectors that are kept. Those of later groups take less than the matrices they replace.
        """
        bundles = split(self._widths, kernel_bundles(self._widths))
        grams = max(sum(8 * width**2 for width in bundle) for bundle in bundles)
        rows = max(4 * train.block_rows * sum(bundle) for bundle in bundles)
        return PROCESS_BYTES + self._weights + grams + 36 * max(self._widths) ** 2 + rows + self._chunks([train])

    def contribute(self, train: SetPlan, queries: Sequence[SetPlan]) -> int:
        """Queries of all sets, C of one block for all of them, and the features it is made from.

        A span reads each block once for all query sets. While a set's C is encoded the others' is held. Reading the next
        bundle of groups the last is still there.
        """
        groups, item = len(self._groups), ITEM_BYTES[self._spec.contribute.dtype]
        held = sum(4 * planned.rows * self._features for planned in queries)
        c_values = [planned.rows * train.block_rows * groups for planned in queries]
        widest = 4 * train.block_rows * max(self._widths)
        read = 2 * min(READ_BYTES + widest, 4 * train.block_rows * self._features)
        span = held + 4 * sum(c_values) + (4 + item) * max(c_values) + read + self._chunks([train])
        return PROCESS_BYTES + self._weights + max(span, self._precondition(queries))

    def patch(self, train: SetPlan) -> int:
        """Weights, a copy to restore them from, their gradients, the step of the largest tensor, and one batch's tokens."""
        largest = STEP_TENSORS * 4 * self._model.largest_tensor
        tokens = self._spec.score.tail_patch.k * train.length
        return PROCESS_BYTES + 2 * self._weights + largest + self._largest_of(lambda item: self._pass(tokens, item))

    def learn(self, train: SetPlan, queries: SetPlan, tile: int) -> int:
        """C of one tile of queries, in float32; reading the next the last is still there."""
        a_tile = 4 * tile * train.rows * len(self._groups)
        steps = self._spec.learn.epochs * queries.rows
        return PROCESS_BYTES + a_tile * min(2, math.ceil(queries.rows / tile)) + 200 * steps

    def rank(self, train: SetPlan, queries: SetPlan, tile: int) -> int:
        """One block of C, also in float64, what is kept of it for two rankings of two sides, and the texts for BM25."""
        groups = len(self._groups)
        block = tile * train.block_rows * (12 * groups + 40)
        kept = 3 * self.ranked_bytes(train, queries)
        texts = TEXT_BYTES * (train.rows * train.length + queries.rows * queries.length)
        return PROCESS_BYTES + block + kept + texts

    def ranked_bytes(self, train: SetPlan, queries: SetPlan) -> int:
        """Rows, scores and parts of every query, under two weightings and on two sides; and of the two baselines."""
        kept = min(max(self._spec.score.k, RANKED_ROWS), train.rows)
        return queries.rows * kept * (2 * 2 * (4 * len(self._groups) + 40) + 2 * 40)

    def _precondition(self, queries: Sequence[SetPlan]) -> int:
        """All groups of one set, before it is written, and the spectrum and rotated queries of one group."""
        most, widest = max(planned.rows for planned in queries), max(self._widths)
        return 4 * most * self._features + 8 * widest**2 + 24 * most * widest

    def _pass(self, tokens: int, item: int) -> int:
        """Weights, their rounded copies under autocast, and what every token keeps alive: layers and two sets of logits."""
        layers = sum(group.out_features for group in self._groups) + sum(map(math.isqrt, self._widths))
        a_token = item * (LAYER_OUTPUTS * layers + 2 * self._model.outputs)
        rounded = self._weights // 2 if item == 2 else 0
        return self._weights + rounded + int(tokens * a_token) + LOSS_BYTES

    def _largest_of(self, memory: Callable[[int], int]) -> int:
        """Memory by bytes a value takes in the run's precision; ``auto`` is decided on the worker, so the larger counts."""
        precision = self._spec.model.precision
        return max(memory(item) for item, name in ((4, "float32"), (2, "bfloat16")) if precision in (name, "auto"))

    def _chunks(self, sets: Sequence[SetPlan]) -> int:
        at_once = CHUNKS_AT_ONCE["://" in self._spec.run.store]
        return at_once * max(planned.largest_chunk_bytes for planned in sets)
