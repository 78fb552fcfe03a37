from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradstore.store.examples import Example, data_hash, from_table, hash_inputs, to_table


def _example(**inputs: np.ndarray) -> Example:
    return Example(
        example_id="a/1.txt",
        source="corpus",
        label=None,
        text="Grüße",
        content_hash=hash_inputs(inputs),
        size=3,
        inputs=inputs,
    )


def _through_parquet(table: pa.Table) -> pa.Table:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return pq.read_table(io.BytesIO(buffer.getvalue()))


def test_the_table_has_the_columns_that_the_store_is_promised() -> None:
    table = to_table([_example(tokens=np.array([1, 2, 3], np.int32))], first_row=7)

    assert table.column_names == [
        "row", "example_id", "source", "label", "text", "content_hash", "size", "input:tokens",
    ]  # fmt: skip
    assert table.column("row").to_pylist() == [7]
    assert table.column("label").to_pylist() == [None]
    assert table.column("input:tokens").to_pylist() == [[1, 2, 3]]
    assert table.schema.field("input:tokens").type.value_type == pa.int32()


def test_examples_return_from_parquet_as_they_went_in() -> None:
    examples = [
        _example(tokens=np.array([5, 6], np.int32), pixels=np.arange(12, dtype=np.uint8).reshape(2, 2, 3)),
        replace(
            _example(tokens=np.array([9], np.int32), pixels=np.ones((1, 4, 3), np.uint8)), label="sport", example_id="b"
        ),
    ]

    returned = from_table(_through_parquet(to_table(examples, first_row=0)))

    for before, after in zip(examples, returned, strict=True):
        assert (after.example_id, after.source, after.label) == (before.example_id, before.source, before.label)
        assert (after.text, after.content_hash, after.size) == (before.text, before.content_hash, before.size)
        assert hash_inputs(after.inputs) == before.content_hash


def test_examples_are_read_from_a_slice_and_from_pieces_of_a_table() -> None:
    examples = [_example(tokens=np.arange(n, dtype=np.int32)) for n in (2, 3, 4)]
    table = to_table(examples, first_row=0)

    sliced = from_table(table.slice(1, 2))
    joined = from_table(pa.concat_tables([table.slice(2, 1), table.slice(0, 1)]))

    assert [example.inputs["tokens"].size for example in sliced] == [3, 4]
    assert [example.inputs["tokens"].size for example in joined] == [4, 2]


@given(
    st.integers(0, 4).flatmap(
        lambda ndim: st.lists(
            hnp.arrays(np.float32, hnp.array_shapes(min_dims=ndim, max_dims=ndim, max_side=3)), min_size=1, max_size=4
        )
    )
)
def test_arrays_of_any_shape_survive_the_table(arrays: list[np.ndarray]) -> None:
    returned = from_table(to_table([_example(x=array) for array in arrays], first_row=0))

    for before, after in zip(arrays, returned, strict=True):
        np.testing.assert_array_equal(after.inputs["x"], before)
        assert after.inputs["x"].dtype == before.dtype


def test_a_table_refuses_inputs_that_differ_in_type() -> None:
    with pytest.raises(ValueError, match="'x' must have one type"):
        to_table([_example(x=np.zeros(2, np.int32)), _example(x=np.zeros(2, np.float32))], first_row=0)
    with pytest.raises(ValueError, match="at least one example"):
        to_table([], first_row=0)


def test_the_content_hash_sees_names_types_shapes_and_values() -> None:
    base = np.array([[1, 2], [3, 4]], np.int32)
    different: list[dict[str, np.ndarray]] = [
        {"tokens": base},
        {"other": base},
        {"tokens": base.astype(np.int64)},
        {"tokens": base.reshape(-1)},
        {"tokens": base + 1},
    ]

    assert len({hash_inputs(inputs) for inputs in different}) == len(different)
    assert hash_inputs({"tokens": base.astype(">i4")}) == hash_inputs({"tokens": base})
    assert hash_inputs({"tokens": np.asfortranarray(base)}) == hash_inputs({"tokens": base})


def test_appending_rows_extends_the_data_hash() -> None:
    a, b, c = (_example(tokens=np.array([n], np.int32)) for n in range(3))

    assert data_hash([b, c], start=data_hash([a])) == data_hash([a, b, c])
    assert data_hash([a, b]) != data_hash([b, a])
    assert data_hash([a, b]) != data_hash([a, replace(b, example_id="another")])
    assert data_hash([a, b]) != data_hash([a, replace(b, label="another")])
