"""What an adapter is: a model, its data and its task, behind three methods and two facts about itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn


class Adapter(Protocol):
    """A model, its data and its task.

    An adapter is made from run.toml alone, in the command and again in every worker, so making one does no work.
    ``load``, ``examples`` and ``outputs`` are what it does; ``identity``, ``output_heads`` and ``longest`` are what it says
    of itself.
    """

    def load(self, device: str) -> nn.Module:
        """Return the model in evaluation mode, with dropout impossible; ``meta`` builds it without its weights."""
        ...

    def examples(self) -> Examples:
        """Return the examples of every split; only the creator of a store calls it."""
        ...

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return f(example; theta) [B], differentiable: the sum over an example's positions, never a mean.

        It reads nothing but the examples, and an example's output does not depend on its batch mates. The caller
        chooses autocast.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Return the adapter's part of the feature contract: all that features depend on besides weights and groups."""
        ...

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the modules that map hidden states to outputs, which groups leave out unless asked."""
        ...

    def longest(self, split: str) -> int | None:
        """Return the tokens of the longest example that a split may hold, or None where only the data tells."""
        ...


@runtime_checkable
class DeclaresShape(Protocol):
    """An adapter that may know the shape of its examples before any is read."""

    def blank(self) -> Example | None:
        """Return an example of that shape with nothing on it; None where only the data tells."""
        ...


@runtime_checkable
class WithResiduals(Protocol):
    """An adapter of which an output function needs, beside the gradient, how wrong the model is about an example."""

    def outputs_and_residuals(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        """Return f [B] as ``outputs`` does and, of one pass, the residuals [B], detached; None if f needs none."""
        ...


class QueryReader(Protocol):
    """Makes examples of queries which are in no split, as often as it is asked to."""

    def __call__(self, records: Sequence[Mapping[str, Any]], *, truncate: bool) -> list[Example]:
        """Return the examples of some records, cut as those of data.eval are.

        One that is longer than data.eval.length is cut only if ``truncate`` says so. DataError if one cannot be a query.
        """
        ...


@runtime_checkable
class TakesQueries(Protocol):
    """An adapter that new queries can be asked of."""

    def query_reader(self) -> QueryReader:
        """Return what makes examples of queries."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFacts:
    """What was read from one source, and what was dropped.

    A source whose documents are taken in their own order is read only as far as its splits need; what depends on the
    tokens is known only for the documents that came in question for a row.

    Attributes
    ----------
    source
        The source as run.toml names it.
    documents
        Documents read.
    duplicates
        Documents whose normalised text an earlier one has.
    alike
        Rows whose tokens an earlier row has, though their documents differ elsewhere.
    empty
        Documents without a character other than whitespace; a prompt without a completion, a chat without a reply.
    short
        Documents with too few tokens for one to be predicted.
    unpredicted
        Documents of which no token that counts as predicted (of a completion, or of the assistant) lies within
        data.length.
    noun
        What the source holds: documents, images.
    first_empty
        Names of the first that are empty.
    """

    source: str
    documents: int
    duplicates: int
    alike: int
    empty: int
    short: int
    unpredicted: int = 0
    noun: str = "documents"
    first_empty: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: ``2,225 documents read from ...; dropped: 101 duplicates``."""
        counts = {
            "duplicates": self.duplicates,
            "alike in all tokens that are read": self.alike,
            "empty": self.empty,
            "too short": self.short,
            "without a completion within data.length": self.unpredicted,
        }
        if self.first_empty:
            counts[f"empty ({', '.join(self.first_empty)}{', ...' if self.empty > len(self.first_empty) else ''})"] = (
                counts.pop("empty")
            )
        dropped = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        return f"{self.documents:,} {self.noun} read from {self.source}; dropped: {dropped or 'none'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """How the examples came about: per source what was read and dropped, per split the rows it got."""

    sources: tuple[SourceFacts, ...] = ()
    rows: Mapping[str, int]

    def describe(self) -> str:
        """One line per source, and one for the rows of the splits."""
        lines = [source.describe() for source in self.sources]
        lines.append("rows: " + ", ".join(f"{name} {count:,}" for name, count in self.rows.items()))
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples of every split, by its name, in row order."""

    splits: Mapping[str, Sequence[Example]]
    facts: Facts
