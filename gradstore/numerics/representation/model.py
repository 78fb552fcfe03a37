"""Representations of texts as gradients: of a linear probe on what an encoder makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an encoder's hidden states become representations.

    Attributes
    ----------
    layers
        Numbers of the hidden states that are pooled, each of which is a group: 0 are the embeddings of tokens.
    pooling
        The mean over the tokens, the first, or the last.
    normalize
        Whether every representation is divided by its norm.
    context
        Most tokens of a text that are read.
    """

    layers: Sequence[int]
    pooling: Pooling
    normalize: bool
    context: int


class Representation(nn.Module):
    r"""An encoder, and a linear probe on what it makes of a text, layer by layer; every probe is a parameter group.

    .. math:: f(x) = \sum_j \langle w_j, \mathrm{Enc}_j(x) \rangle, \qquad \nabla_{w_j} f(x) = \mathrm{Enc}_j(x)

    so that the gradient of f is the representation, whatever the weights of the probes, which are zero. The encoder is frozen.

    Parameters
    ----------
    encoder
        A model of transformers that puts out hidden states.
    dense
        Linear layer on what is pooled, or None.
    reading
        How states become representations.
    """

    def __init__(self, encoder: nn.Module, dense: nn.Linear | None, reading: Reading) -> None:
        super().__init__()
        config: Any = encoder.config
        self.encoder = encoder.requires_grad_(False)
        self.dense = dense if dense is None else dense.requires_grad_(False)
        self.reading = reading
        width = int(config.hidden_size) if dense is None else dense.out_features
        device = next(encoder.parameters()).device
        probes = {}
        for layer in reading.layers:
            probe = nn.Linear(width, 1, bias=False, device=device)
            nn.init.zeros_(probe.weight)
            probes[str(layer)] = nn.ModuleDict({"pooled": probe})
        self.layers = nn.ModuleDict(probes)

    def representations(
        self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> Mapping[str, Float[Tensor, "B width"]]:
        """Enc_j of some texts by the number of its layer; ``mask`` is True where there is no padding."""
        states = self._states(tokens, mask)
        found = {}
        for layer in self.layers:
            pooled = _pooled(states[int(layer)].float(), mask, self.reading.pooling)
            if self.dense is not None:
                pooled = self.dense(pooled)
            found[layer] = nn.functional.normalize(pooled, dim=1) if self.reading.normalize else pooled
        return found

    def pooled_states(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B width"]:
        """The pooled states of the last of the layers, before the linear layer and unnormalised; differentiable."""
        return _pooled(self._states(tokens, mask)[self.reading.layers[-1]].float(), mask, self.reading.pooling)

    def _states(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Sequence[Float[Tensor, "B T width"]]:
        # Without a mask attention takes its fastest kernel.
        needed = None if bool(mask.all()) else mask
        found: Sequence[Tensor] = self.encoder(
            input_ids=tokens, attention_mask=needed, output_hidden_states=True
        ).hidden_states
        return found

    def forward(self, tokens: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
        """F of some texts, which is zero; its gradients are their representations."""
        with torch.no_grad():
            found = self.representations(tokens, mask)
        probes: Any = self.layers
        return torch.stack([probes[layer]["pooled"](of_layer)[:, 0] for layer, of_layer in found.items()]).sum(0)


def padded(
    texts: Sequence[Int[np.ndarray, " _"]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Return tokens with zeros behind those of shorter texts, and which are no padding."""
    sizes = torch.tensor([len(row) for row in texts])
    tokens = torch.zeros(len(texts), int(sizes.max()), dtype=torch.long)
    for place, row in enumerate(texts):
        tokens[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    mask = torch.arange(tokens.shape[1]) < sizes[:, None]
    return tokens.to(device), mask.to(device)


def _pooled(
    states: Float[Tensor, "B T width"], mask: Bool[Tensor, "B T"], pooling: Pooling
) -> Float[Tensor, "B width"]:
    if pooling == "first":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(1) / weights.sum(1)
