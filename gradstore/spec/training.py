"""[training]: how models are made of train examples."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gradstore.spec.section import Section


class TrainingSection(Section):
    """[training]: the trainer of the run's model, of those that `gradstore evaluate` retrains and of `gradstore train`.

    ``trainer`` is ``scratch`` or a function ``module:function``, ``options`` are its own. ``base`` stands for ``model.source``
    where the model is made anew: a folder or hub id whose configuration, and for texts whose tokenizer, it has.
    """

    trainer: str = Field(default="scratch", min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    base: str | None = Field(default=None, min_length=1)
