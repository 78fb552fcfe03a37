"""Examples that the model itself writes: queries whose proponents are what made the model write them (paper, C.6)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from gradstore.adapters.text.packing import Row
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection, resolve_kind

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPT_TOKENS: Final = 32
"""Tokens of a prompt that is the beginning of a text."""

SUFFIX: Final = "+generated"
"""What the ids of generated examples end with; they begin with the id of the row whose prompt it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The table ``generate`` of a split: how the model writes its examples.

    Attributes
    ----------
    prompts
        ``train``: the prompts are of the rows of data.train, the split's ``start`` and ``rows`` count these, and it needs
        no source. Otherwise they are of rows of the split's own source.
    prompt_tokens
        First tokens of a row that are its prompt: of a text 32 unless given, of a row with a prompt of its own all of
        that, and never more than that.
    new_tokens
        Tokens to write at most; it may end earlier, with the token that ends a text.
    temperature
        0 takes the likeliest token; otherwise tokens are drawn from softmax(scores / temperature).
    seed
        Of the draws; each row has draws of its own, whatever its neighbours.
    mask_prompt
        Whether only what the model wrote counts as predicted.
    device
        Where the creator of the store runs the model; ``auto`` is CUDA where it sees it.
    """

    prompts: Literal["train"] | None = None
    prompt_tokens: int | None = None
    new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    mask_prompt: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Writer(Protocol):
    """Continues prompts; see `ModelWriter`."""

    def write(self, prompt: np.ndarray, generation: Generation, name: str) -> np.ndarray:
        """Return the new tokens int32 [t], t >= 1; ``name`` is what the draws are keyed by."""
        ...


def resolve_generation(split: SplitSection, key: str) -> Generation | None:
    """Return how a split's examples are generated, None if they are not.

    Raises
    ------
    SpecError
        If a key is unknown or has no such value, or the split does not say how many rows it generates.
    """
    if split.generate is None:
        return None
    key = f"{key}.generate"
    generation = resolve_kind({"generate": Generation}, "generate", split.generate, key)
    if key.startswith("data.train."):
        raise SpecError(f"{key}: training examples cannot be generated; only queries can.")
    least = {"prompt_tokens": 1, "new_tokens": 1, "temperature": 0, "seed": 0}
    for name, bound in least.items():
        value = getattr(generation, name)
        if value is not None and value < bound:
            raise SpecError(f"{key}.{name}: found {value}; accepted: {bound} or more.")
    if (generation.prompt_tokens or 1) + generation.new_tokens > split.length:
        raise SpecError(
            f"{key}: prompt_tokens and new_tokens = {generation.new_tokens} exceed length = {split.length}. Raise length."
        )
    if split.rows is None:
        raise SpecError(f"{key.removesuffix('.generate')}.rows: is missing; say how many examples are generated.")
    return generation


def generated_rows(rows: Sequence[Row], generation: Generation, length: int, key: str, writer: Writer) -> Iterator[Row]:
    """Yield each row's prompt with what the model writes after it.

    Raises
    ------
    DataError
        If a row has no prompt, or its prompt leaves too little of ``length``.
    """
    for row in rows:
        prompt = _prompt(row, generation)
        room = length - generation.new_tokens
        if not 1 <= len(prompt) <= room:
            raise DataError(
                f"{key}.generate: the prompt of {row.row_id} has {len(prompt):,} tokens; with new_tokens = "
                f"{generation.new_tokens} and length = {length:,} it may have 1 to {room:,}. Set "
                f"{key}.generate.prompt_tokens, or raise {key}.length."
            )
        written = writer.write(prompt, generation, row.row_id)
        tokens = np.concatenate([prompt, written]).astype(np.int32)
        yield replace(
            row,
            row_id=f"{row.row_id}{SUFFIX}",
            tokens=tokens,
            predicted=np.arange(len(tokens)) >= len(prompt) if generation.mask_prompt else None,
            text=None,
        )


def _prompt(row: Row, generation: Generation) -> np.ndarray:
    if row.predicted is None:
        return row.tokens[: generation.prompt_tokens or PROMPT_TOKENS]
    own = int(np.flatnonzero(row.predicted)[0])
    return row.tokens[: min(generation.prompt_tokens or own, own)]


@dataclass(kw_only=True)
class ModelWriter:
    """Continues prompts with a causal language model, which it loads when the first is asked for.

    Prompts are continued one by one, in float32 and on one thread: what is written depends on the prompt alone, not on
    its neighbours, and is the same in every run on one kind of machine. Where two tokens are as good as equally likely,
    another kind of processor may choose the other.

    Attributes
    ----------
    load
        Loads the model onto a device.
    end
        The token that ends a text, None if the tokenizer has none; the model's own generation settings may name others.
    source
        Where the model is from, for messages.
    """

    load: Callable[[str], nn.Module]
    end: int | None
    source: str
    _models: dict[str, nn.Module] = field(default_factory=dict, init=False)

    def write(self, prompt: np.ndarray, generation: Generation, name: str) -> np.ndarray:
        """Return at most ``new_tokens`` tokens int32 that follow the prompt; the last may be one that ends a text.

        Raises
        ------
        SpecError
            If the model keeps no cache of its past.
        """
        import torch

        from gradstore.numerics.generator import derive_key, words

        device = generation.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in self._models:
            self._models[device] = self.load(device)
        model = self._models[device]
        ends = self._ends(model)
        draws = words(derive_key(generation.seed, name, "generate"), generation.new_tokens)
        written: list[int] = []
        step, past = torch.from_numpy(prompt.astype(np.int64))[None].to(device), None
        with torch.inference_mode(), one_thread():
            for draw in draws:
                output = model(input_ids=step, past_key_values=past, use_cache=True)
                past = getattr(output, "past_key_values", None)
                if past is None:
                    raise SpecError(f"generate: {self.source} keeps no cache of its past, which generating here needs.")
                written.append(_choose(output.logits[0, -1], generation.temperature, int(draw)))
                if written[-1] in ends:
                    break
                step = torch.tensor([[written[-1]]], device=device)
        return np.asarray(written, np.int32)

    def _ends(self, model: nn.Module) -> frozenset[int]:
        named: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = [named] if isinstance(named, int) else named or []
        return frozenset([*named, *([] if self.end is None else [self.end])])


def _choose(scores_V: Tensor, temperature: float, draw: int) -> int:  # noqa: N803 - the shape suffix of numerics
    """The likeliest token, or the one at which the cumulated probabilities pass a uniform draw of 64 bits."""
    if temperature == 0:
        return int(scores_V.argmax())
    probabilities = (scores_V.double().cpu() / temperature).softmax(0).numpy()
    uniform = (draw >> 11) * 2.0**-53
    cumulated = probabilities.cumsum()
    return int(np.searchsorted(cumulated, uniform * cumulated[-1], side="right"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
