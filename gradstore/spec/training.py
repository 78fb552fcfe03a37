"""[training]: how models are made of train examples."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.section import Section


class TrainingSection(Section):
    """[training]: the trainer of the run's model, of those that `gradstore evaluate` retrains and of `gradstore train`.

    ``trainer`` is ``scratch``, which begins with random parameters, ``fine_tune``, which begins with those of ``base``, ``airrep``,
    which trains an encoder of texts, or a function ``module:function``; ``options`` are its own. ``base`` stands for
    ``model.source`` where the model is made anew: a folder or hub id whose configuration, and for texts whose tokenizer, it has.
    """

    trainer: str = Field(default="scratch", min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    base: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check(self) -> TrainingSection:
        if self.trainer in ("fine_tune", "airrep") and self.base is None:
            raise SpecError(
                f"training.base: is missing; {self.trainer} begins with its weights. Name a folder or hub id, or set another trainer."
            )
        return self
