"""[signal]: what an encoder learns attribution from."""

from __future__ import annotations

from pydantic import Field

from gradstore.spec.section import NAME, Section


class SignalSection(Section):
    """[signal]: models that are trained on small subsets of the train examples, each from the same start.

    There are ``subsets`` of ``examples`` each, by the trainer of [training], ``seeds`` models of every one. A share ``local`` of the
    subsets are neighbourhoods: drawn from the ``neighbours`` train examples, twice ``examples`` unless given, that are most
    similar to a learn query, by the embeddings of [evaluate]. The others are drawn from all.
    """

    name: str = Field(default="signal", pattern=NAME)
    subsets: int = Field(default=100, ge=2)
    examples: int = Field(default=50, ge=1)
    local: float = Field(default=0.5, ge=0, le=1)
    neighbours: int | None = Field(default=None, ge=1)
    seeds: int = Field(default=1, ge=1)
