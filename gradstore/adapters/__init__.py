"""Adapters: what a model, its data and its task are. One file per family, one line in ADAPTERS.

Importing this package imports neither torch nor transformers: they load when an adapter first needs them.
"""

from __future__ import annotations

from collections.abc import Callable

from gradstore.adapters.causal_lm import CausalLM
from gradstore.adapters.diffusion import Diffusion
from gradstore.adapters.encoder import Represents, TextEncoder
from gradstore.adapters.image_classifier import ImageClassifier
from gradstore.adapters.models.precision import resolve_precision
from gradstore.adapters.protocol import (
    Adapter,
    DeclaresShape,
    Examples,
    Facts,
    QueryReader,
    SourceFacts,
    TakesQueries,
    WithResiduals,
)
from gradstore.adapters.synthetic import Synthetic
from gradstore.spec import DataSection, ModelSection

ADAPTERS: dict[str, Callable[[ModelSection, DataSection, int], Adapter]] = {
    "causal_lm": CausalLM,
    "image_classifier": ImageClassifier,
    "diffusion": Diffusion,
    "text_encoder": TextEncoder,
    "synthetic": Synthetic,
}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "DeclaresShape",
    "Examples",
    "Facts",
    "QueryReader",
    "Represents",
    "SourceFacts",
    "TakesQueries",
    "WithResiduals",
    "resolve_precision",
]
