"""[evaluate]: what is measured of scores by `gradstore evaluate`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.section import NAME, Section

Baseline = Literal["bm25", "tfidf", "embedding", "cosine", "random"]
# tfidf needs a package that not everyone has.
_BASELINES: Final[tuple[Baseline, ...]] = ("bm25", "embedding", "cosine", "random")
LABEL: Final = "label"
"""In ``evaluate.recall.by``, where anything else is a file."""


class StepSection(Section):
    """One optimizer step on the ``k`` proponents of a query, as one batch.

    ``saved`` is the optimizer whose state ``model.optimizer`` names, ``adamw`` and ``sgd`` are fresh.
    """

    k: int = Field(default=10, ge=1)
    optimizer: Literal["adamw", "sgd", "saved"] = "adamw"
    learning_rate: float = Field(default=1e-5, gt=0)


class TailPatchSection(StepSection):
    """[score.tail_patch]: what such a step does to some queries, the first ones."""

    queries: int = Field(default=10, ge=0)


class MeasuredTailPatchSection(StepSection):
    """[evaluate.tail_patch]: what such a step does to all eval queries, or so many of them."""

    queries: int | None = Field(default=None, ge=1)


class RecallSection(Section):
    """[evaluate.recall]: which train examples are known to have contributed to an eval query, and how many rows are looked at.

    ``pairs`` is a file with the columns query and example, ids of both. Or ``by`` says that it is the examples that share
    something with the query: its label, or its value in a file with the columns id and value. Lists of ``k`` are measured
    together; ``name`` tells apart what is measured by several such.
    """

    name: str | None = Field(default=None, pattern=NAME)
    pairs: str | None = Field(default=None, min_length=1)
    by: str | None = Field(default=None, min_length=1)
    k: list[Annotated[int, Field(ge=1)]] = Field(default=[10, 100], min_length=1)

    @model_validator(mode="after")
    def _check(self) -> RecallSection:
        if (self.pairs is None) == (self.by is None):
            found = "neither pairs nor by" if self.pairs is None else "both pairs and by"
            raise SpecError(
                f'evaluate.recall: found {found}; accepted: one of pairs = "pairs.jsonl", a file with the columns query and '
                'example, and by = "label", or by = "styles.csv", a file with the columns id and value.'
            )
        if len({*self.k}) < len(self.k):
            raise SpecError(f"evaluate.recall.k: found {self.k}; accepted: different numbers.")
        return self


class DatamodelingSection(Section):
    """[evaluate.lds]: how models are retrained on subsets of the train examples, by the trainer of [training].

    Of every one of the ``subsets``, which hold a ``share`` of the examples each, ``seeds`` models are trained and their outputs
    averaged. ``name`` tells apart retrainings by several trainers. ``output`` is the output function of which retrained models are
    asked, ``model.output`` unless given, and of diffusion models the error of the noise. ``store`` is where they are kept, the run's
    own unless given: runs on the same examples may share them. ``groups`` asks for the LDS of every parameter group alone.
    ``choose`` names the queries by which one of the run's kernels and weights is chosen. ``pool`` is how the scores of a subset's
    examples become what they predict of it: their ``sum``, or by ``attention``, as AirRep does, which is paid by scores times
    ``sharpness``; baselines are summed.
    """

    name: str = Field(default="half", pattern=NAME)
    subsets: int = Field(default=32, ge=2)
    share: float = Field(default=0.5, gt=0, lt=1)
    seeds: int = Field(default=1, ge=1)
    output: str | None = Field(default=None, min_length=1)
    store: str | None = Field(default=None, min_length=1)
    groups: bool = True
    pool: Literal["sum", "attention"] = "sum"
    sharpness: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    choose: str | None = None

    @property
    def title(self) -> str:
        """What tells it from others that are measured in a store: the models, and the pool unless it is the sum."""
        models = f"{self.name}.{self.subsets}x{self.seeds}"
        sharpness = "" if self.sharpness == 1 else f"{self.sharpness:g}"
        return models if self.pool == "sum" else f"{models}.{self.pool}{sharpness}"

    @model_validator(mode="after")
    def _check(self) -> DatamodelingSection:
        if self.choose not in (None, "learn"):
            found = f"evaluate.lds.choose: found {self.choose!r}"
            if self.choose == "eval":
                found += ", the queries that are reported: what is chosen by them is no longer measured by them"
            raise SpecError(f'{found}; accepted: "learn".')
        if self.pool == "sum" and self.sharpness != 1:
            raise SpecError(
                f'evaluate.lds.sharpness: found {self.sharpness} with pool = "sum", which pays no attention; set pool = "attention", or '
                "leave sharpness out."
            )
        return self


class MislabelSection(Section):
    """[evaluate.mislabel]: which train examples are known to have a wrong label, and among how many they are looked for.

    ``examples`` is a file of the ids of those whose label is wrong, one a line; without it they are those that
    ``model.options.mislabelled`` made wrong. ``rows`` are looked through, drawn by the run's seed. Self-influence is also divided
    by the mean of an example's ``top`` highest scores; 0 leaves that out.
    """

    examples: str | None = Field(default=None, min_length=1)
    rows: int = Field(default=5000, ge=2)
    top: int = Field(default=10, ge=0)


class EvaluateSection(Section):
    """[evaluate]: a table for each measure, and the baselines that stand beside.

    Embeddings are hidden states of the run's model, or those of the sentence encoder that ``encoder`` names, a folder or hub id.
    """

    baselines: list[Baseline] = Field(default_factory=lambda: [*_BASELINES])
    encoder: str | None = Field(default=None, min_length=1)

    recall: RecallSection | None = None
    lds: DatamodelingSection | None = None
    mislabel: MislabelSection | None = None
    tail_patch: MeasuredTailPatchSection | None = None
