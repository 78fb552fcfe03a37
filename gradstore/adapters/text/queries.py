"""From what a user asks about to examples: a text, a prompt with its completion, or a chat, read and cut as data.eval is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from gradstore.adapters.text.encoding import PREDICTED, TOKENS, Encoded, TextEncoder, encode_documents
from gradstore.adapters.text.packing import SHORTEST
from gradstore.adapters.text.records import COLUMNS, Document, Form, RecordReader, resolve_form
from gradstore.errors import DataError
from gradstore.spec import SplitSection
from gradstore.store.examples import Example, hash_inputs

_KEY: Final = "query"


def query_examples(
    records: Sequence[Mapping[str, Any]], *, split: SplitSection, encoder: TextEncoder, truncate: bool
) -> list[Example]:
    """Return the example of every record.

    A record is a text, a prompt with its completion, or messages, under these names or under those of the split's columns;
    its own columns tell which, whatever the split's examples are.

    Parameters
    ----------
    records
        The records.
    split
        How the store's queries are cut.
    encoder
        What turns texts into tokens.
    truncate
        Whether one that is longer than the split's length is cut, as the split's examples are.

    Raises
    ------
    DataError
        If a record is none of the three, is empty, too short for a token to be predicted, or longer than the split's length.
    """
    found = [
        _query(record, f"{_KEY}-{number}", split, encoder, truncate=truncate)
        for number, record in enumerate(records, start=1)
    ]
    if not any(PREDICTED in example.inputs for example in found):
        return found
    # The examples of a set have the same inputs: of a text every token counts.
    return [_with_predicted(example) for example in found]


def _with_predicted(example: Example) -> Example:
    inputs = {PREDICTED: np.ones(example.size, bool), **example.inputs}
    return replace(example, inputs=inputs, content_hash=hash_inputs(inputs))


def _query(
    record: Mapping[str, Any], name: str, split: SplitSection, encoder: TextEncoder, *, truncate: bool
) -> Example:
    form, values = _form_of(record, name, split)
    columns = {option: option for option in COLUMNS[form]}
    reader = RecordReader(split=SplitSection.model_validate({"source": _KEY, **columns}), key=name, form=form)
    document = reader.document(values, name, 1)
    if not document.text.strip():
        raise DataError(f"{name}: is empty, or nothing in it is predicted. Give a text, a completion, or a reply.")
    encoded = _encoded(document, form, split, encoder, name)
    length = split.length
    if len(encoded.tokens) > length and not truncate:
        raise DataError(
            f"{name}: has {len(encoded.tokens):,} tokens; the store's queries have at most {length:,} (data.eval.length). "
            "Shorten it, or have it cut as they are: --truncate."
        )
    inputs = {TOKENS: encoded.tokens[:length]}
    if encoded.predicted is not None:
        inputs[PREDICTED] = encoded.predicted[:length]
    if len(encoded.tokens) < SHORTEST or (PREDICTED in inputs and not inputs[PREDICTED][1:].any()):
        raise DataError(
            f"{name}: none of its first {min(len(encoded.tokens), length):,} tokens is predicted from others. Give a longer text, "
            "or a shorter prompt."
        )
    whole = len(encoded.tokens) <= length
    return Example(
        example_id=name,
        source=_KEY,
        label=None,
        text=document.text if whole else encoder.decode(inputs[TOKENS]),
        content_hash=hash_inputs(inputs),
        size=len(inputs[TOKENS]),
        inputs=inputs,
    )


def _form_of(record: Mapping[str, Any], name: str, split: SplitSection) -> tuple[Form, dict[str, Any]]:
    """What a record is, and its values under the names of the form's options."""
    # Of a record that could be read in several ways, the split's own.
    for form in dict.fromkeys((resolve_form(split, _KEY), *COLUMNS)):
        options = COLUMNS[form]
        columns = {option: (option, getattr(split, option)) for option in options}
        found = {option: record[column] for option, names in columns.items() for column in names if column in record}
        if set(found) == set(options):
            return form, found
    raise DataError(
        f"{name}: found {', '.join(map(repr, record)) or 'nothing'}; accepted: text, or prompt and completion, or messages."
    )


def _encoded(document: Document, form: Form, split: SplitSection, encoder: TextEncoder, name: str) -> Encoded:
    if form == "text" and split.packing == "concatenate":
        # As a document is that is joined with others: bare, and ended.
        (tokens,) = encoder.encode([document.text], special=False)
        return Encoded(tokens=np.append(tokens, np.int32(encoder.end_token(name))))
    (encoded,) = encode_documents([document], form, encoder, name)
    return encoded
