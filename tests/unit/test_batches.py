from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gradstore.stages.featurize.batches import batches

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(sizes=SIZES, token_budget=st.integers(1, 200))
def test_every_row_is_in_one_batch_and_no_batch_passes_the_budget(sizes: list[int], token_budget: int) -> None:
    cut = batches(sizes, token_budget)
    assert sorted(row for batch in cut for row in batch) == list(range(len(sizes)))
    for batch in cut:
        padded = len(batch) * max(sizes[row] for row in batch)
        assert padded <= token_budget or len(batch) == 1


def test_the_longest_rows_come_first_so_that_memory_runs_out_early_or_never() -> None:
    assert batches([3, 9, 3, 8], 18) == [[1, 3], [0, 2]]
