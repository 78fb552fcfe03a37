"""What all tables of run.toml have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Names of kernels, weights and aspects: "<kernel>.<weights>" names their scores, so none has a dot.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class Section(BaseModel):
    """A table of run.toml: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
