"""Records of a source as documents: which columns hold what, and that they hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection

Form = Literal["text", "completion", "messages"]
"""What an example is: a text, a prompt with its completion, or a chat."""

ASSISTANT: Final = "assistant"
COLUMNS: Final[Mapping[Form, tuple[str, ...]]] = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Characters [start, stop) of a document, and who wrote them: ``prompt``, ``completion``, or a role of a chat."""

    role: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text of a source, with what the source calls it.

    Attributes
    ----------
    document_id
        What the source calls it.
    text
        All of it: a prompt with its completion behind it, a chat as a person reads it. Empty where nothing is predicted.
    label
        The value of the label column, or None.
    turns
        The turns that a prompt with a completion, or a chat, is made of; none of a plain text.
    """

    document_id: str
    text: str
    label: str | None
    turns: tuple[Turn, ...] = ()

    def messages(self) -> list[dict[str, str]]:
        """Return the turns as chat templates take them."""
        return [{"role": turn.role, "content": self.text[turn.start : turn.stop]} for turn in self.turns]


def resolve_form(split: SplitSection, key: str) -> Form:
    """Return what the examples of a split are.

    Raises
    ------
    SpecError
        If its columns belong to more than one form, or a prompt has no completion, or the form is not cut so.
    """
    # The column of texts has a default, so that only another name says that texts are meant.
    text = SplitSection.model_fields["text"].default
    named = [option for option in ("prompt", "completion", "messages") if getattr(split, option) is not None]
    named += ["text"] if split.text != text else []
    forms = [form for form, options in COLUMNS.items() if set(options) & set(named)]
    form: Form = forms[0] if forms else "text"
    if len(forms) > 1 or (form == "completion" and len(named) == 1):
        raise SpecError(
            f"{key}: found columns {', '.join(f'{name} = {getattr(split, name)!r}' for name in named)}; "
            "accepted: text, or prompt and completion, or messages."
        )
    if form != "text" and split.packing == "concatenate":
        raise SpecError(
            f'{key}.packing: found "concatenate" with {" and ".join(named)}; an example whose prompt does not count '
            'stands alone. Set packing = "document".'
        )
    return form


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordReader:
    """Makes documents of records, which are columns with their values.

    Attributes
    ----------
    split
        What run.toml says of the source.
    key
        Where run.toml says it, for messages: ``data.train``.
    form
        What a record is: see `resolve_form`.
    """

    split: SplitSection
    key: str
    form: Form

    def columns(self) -> list[str]:
        """Return the columns to read."""
        columns = (getattr(self.split, option) for option in self._options())
        return list(dict.fromkeys(column for column in columns if column is not None))

    def require_columns(self, found: Sequence[str], where: str) -> None:
        """Refuse a source without the columns that run.toml names."""
        for option in self._options():
            column = getattr(self.split, option)
            if column is not None and column not in found:
                raise DataError(
                    f"{self.key}.{option}: {where} has no column {column!r}; its columns are: {', '.join(found)}."
                )

    def document(self, record: Mapping[str, Any], name: str, row: int) -> Document:
        """Return the document of a record, which is row ``row`` of ``name``.

        Raises
        ------
        DataError
            If a column is missing or does not hold what it should.
        """
        where = f"{name}:{row}"
        self.require_columns(list(record), where)
        label = record[self.split.label] if self.split.label else None
        text, turns = self._content(record, where)
        _refuse_half_characters(text, f"{self.key}: {where}")
        return Document(
            document_id=where if self.split.id is None else str(record[self.split.id]),
            text=text,
            label=None if label is None else str(label),
            turns=turns,
        )

    def _options(self) -> tuple[str, ...]:
        """The keys of run.toml that may name columns."""
        return (*COLUMNS[self.form], "label", "id")

    def _content(self, record: Mapping[str, Any], where: str) -> tuple[str, tuple[Turn, ...]]:
        match self.form:
            case "text":
                return self._text(record, "text", where), ()
            case "completion":
                prompt = self._text(record, "prompt", where)
                completion = self._text(record, "completion", where)
                return _joined([("prompt", prompt), ("completion", completion)], predicted="completion")
            case "messages":
                return self._chat(record[self.split.messages or ""], where)

    def _text(self, record: Mapping[str, Any], option: str, where: str) -> str:
        column = getattr(self.split, option)
        value = record[column]
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{self.key}.{option}: {column!r} of {where} is {type(value).__name__}, not text. "
                f"Columns found: {', '.join(record)}."
            )
        return value or ""

    def _chat(self, messages: Any, where: str) -> tuple[str, tuple[Turn, ...]]:
        expected = 'accepted: a list of {"role": text, "content": text}'
        named = f"{self.key}.messages: {self.split.messages!r} of {where}"
        if not isinstance(messages, list | None):
            raise DataError(f"{named} is {type(messages).__name__}; {expected}.")
        turns = []
        for number, message in enumerate(messages or ()):
            if not isinstance(message, Mapping):
                raise DataError(f"{named}: message {number} is {type(message).__name__}; {expected}.")
            # Columns of structs hold every key in every message, with no value where there is none.
            given = {name: value for name, value in message.items() if value is not None}
            if set(given) != {"role", "content"}:
                raise DataError(f"{named}: message {number} has {', '.join(given) or 'nothing'}; {expected}.")
            for name, value in given.items():
                if not isinstance(value, str):
                    raise DataError(f"{named}: {name} of message {number} is {type(value).__name__}; {expected}.")
            turns.append((given["role"], given["content"]))
        return _joined(turns, predicted=ASSISTANT, shown=True)


def _refuse_half_characters(text: str, where: str) -> None:
    """Refuse what Python takes for text and no tokenizer does: of JSON's escapes, and bytes of a command line that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a character. Mend the text."
        ) from error


def _joined(turns: Sequence[tuple[str, str]], *, predicted: str, shown: bool = False) -> tuple[str, tuple[Turn, ...]]:
    """One text of the turns, with the speakers shown in front if asked for; empty if no turn is there to predict."""
    if not any(content.strip() for role, content in turns if role == predicted):
        return "", ()
    text = ""
    placed: list[Turn] = []
    for role, content in turns:
        if shown:
            text += f"\n\n{role}: " if placed else f"{role}: "
        placed.append(Turn(role=role, start=len(text), stop=len(text) + len(content)))
        text += content
    return text, tuple(placed)
