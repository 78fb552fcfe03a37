"""Embeddings of examples: hidden states of the run's own model, or those of a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gradstore.adapters.models.pretrained import explained, find_source
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn

_KEY = "evaluate.encoder"
_LONGEST = 512


@runtime_checkable
class Embeds(Protocol):
    """An adapter whose model has a hidden state that stands for a whole example."""

    def embeddings(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return one vector for each example [B, width], detached; those of a model are of one width."""
        ...


def encode_sentences(source: str, texts: Sequence[str], device: str) -> Tensor:
    """Embed texts by an encoder of transformers: the mean of its last hidden states over all tokens [B, width].

    Raises
    ------
    SpecError
        If there is no such encoder.
    """
    import torch

    tokenizer, model = _encoder(source, device)
    batch = tokenizer([*texts], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt").to(device)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    return masked_mean(states, batch["attention_mask"])


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of states [B, T, width] over the positions of a mask [B, T]: those that are no padding."""
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(1) / weights.sum(1)


@lru_cache(maxsize=1)
def _encoder(source: str, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    folder = find_source(source, _KEY, "a config.json, weights and a tokenizer")
    holds = "a config.json, weights and a tokenizer"
    with explained(f"{_KEY}: {source!r}", role="a sentence encoder", holds=holds):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModel.from_pretrained(folder, trust_remote_code=False)
    return tokenizer, model.eval().to(device)
