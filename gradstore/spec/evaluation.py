"""[evaluate]: what is measured of scores by `gradstore evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.section import NAME, Section


class RecallSection(Section):
    """[evaluate.recall]: which train examples are known to have contributed to an eval query, and how many rows are looked at.

    ``pairs`` is a file with the columns query and example, ids of both; or ``by`` says that it is the examples of the
    query's label. Lists of ``k`` are measured together.
    """

    pairs: str | None = Field(default=None, min_length=1)
    by: Literal["label"] | None = None
    k: list[Annotated[int, Field(ge=1)]] = Field(default=[10, 100], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> RecallSection:
        if (self.pairs is None) == (self.by is None):
            found = "neither pairs nor by" if self.pairs is None else "both pairs and by"
            raise SpecError(
                f'evaluate.recall: found {found}; accepted: one of pairs = "pairs.jsonl", a file with the columns query and '
                'example, and by = "label".'
            )
        if len({*self.k}) < len(self.k):
            raise SpecError(f"evaluate.recall.k: found {self.k}; accepted: different numbers.")
        return self


class DatamodelingSection(Section):
    """[evaluate.lds]: how models are retrained on subsets of the train examples.

    ``trainer`` is ``scratch`` or a function ``module:function``, ``options`` are its own; of every one of the ``subsets``, which
    hold a ``share`` of the examples each, ``seeds`` models are trained and their outputs averaged. ``name`` tells apart retrainings
    by several trainers.
    """

    name: str = Field(default="half", pattern=NAME)
    subsets: int = Field(default=32, ge=2)
    share: float = Field(default=0.5, gt=0, lt=1)
    seeds: int = Field(default=1, ge=1)
    trainer: str = Field(default="scratch", min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)


class EvaluateSection(Section):
    """[evaluate]: a table for each measure."""

    recall: RecallSection | None = None
    lds: DatamodelingSection | None = None
