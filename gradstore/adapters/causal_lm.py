"""Causal language models of transformers, on texts: f(x) is the sum of the cross-entropies of an example's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.embedding import masked_mean
from gradstore.adapters.locations import PACKAGE
from gradstore.adapters.models.gguf import dequantise, dequantised_folder, read_config
from gradstore.adapters.models.lora import lora_identity, wrap_in_lora
from gradstore.adapters.models.pretrained import explained, find_source, quiet, refuse_unfilled
from gradstore.adapters.protocol import Examples, QueryReader
from gradstore.adapters.text.encoding import PREDICTED, TOKENS
from gradstore.adapters.text.generation import ModelWriter, resolve_generation
from gradstore.adapters.text.queries import query_examples
from gradstore.adapters.text.records import resolve_form
from gradstore.adapters.text.splits import split_examples
from gradstore.adapters.text.tokenizer import TextTokenizer
from gradstore.errors import SpecError
from gradstore.spec import SPLITS, DataSection, ModelSection, content_hash, key_of
from gradstore.store.examples import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig

OUTPUT: Final = "token_cross_entropy"
_HOLDS: Final = "a config.json, weights and a tokenizer"

# Where a configuration came from, and how it is kept.
NO_ARCHITECTURE: Final = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
)


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Any causal language model of transformers, from a hub id, a folder, or a GGUF file in a folder.

    With ``model.peft`` a LoRA adapter lies on top of it. Code that comes with a model is never run.
    """

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        if self.model.output not in (None, OUTPUT):
            raise SpecError(f"model.output: found {self.model.output!r}; causal_lm has {OUTPUT} alone.")
        if self.model.weights is not None or self.model.options:
            given = "weights" if self.model.weights is not None else f"options.{next(iter(self.model.options))}"
            raise SpecError(f"model.{given}: causal_lm has no such key. Its weights are those of model.source.")
        for name, split in self.data.splits().items():
            if split.labels is not None:
                raise SpecError(f"{key_of(name)}.labels: causal_lm reads none; label names a column that is kept.")
            resolve_form(split, key_of(name))
            resolve_generation(split, key_of(name))

    def load(self, device: str) -> nn.Module:
        """Return the model in float32 and evaluation mode; on ``meta`` its shape, with no weights read.

        With an adapter, all but its parameters are frozen.

        Raises
        ------
        SpecError
            If the model or its adapter cannot be found, or is no causal language model, or no LoRA adapter of it.
        DataError
            If the weights are damaged or do not fill the model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self._config(weights=device != "meta")
        with self._explained():
            if device == "meta":
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    self._folder(),
                    config=config,
                    dtype=torch.float32,
                    attn_implementation="sdpa",
                    output_loading_info=True,
                    # Refused below, by name.
                    ignore_mismatched_sizes=True,
                    **self._revision(),
                )
                refuse_unfilled(
                    "model.source",
                    self.model.source,
                    [str(name) for name in report["missing_keys"]],
                    [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"]],
                    "a causal language model",
                )
        if self.model.peft is not None:
            model = wrap_in_lora(model, self.model.peft, device)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loaded: nn.Module = model.eval().to(device)
        return loaded

    def fresh(self, seed: int, device: str) -> nn.Module:
        """Return the model of the configuration with random parameters of the seed.

        Raises
        ------
        SpecError
            If it is a LoRA adapter, which is made on a model that was trained.
        """
        import torch
        from transformers import AutoModelForCausalLM

        from gradstore.numerics.training import seeded

        if self.model.peft is not None:
            raise SpecError("model.peft: a model with an adapter is not made anew. Name a trainer of your own.")
        with self._explained(), seeded(seed):
            model: nn.Module = AutoModelForCausalLM.from_config(
                self._config(weights=False), dtype=torch.float32, attn_implementation="sdpa"
            )
        return model.to(device)

    def saved_place(self) -> Path:
        """Return the folder that ``model.source`` names."""
        source = self.model.source
        if self.model.peft is not None or self.model.gguf_file is not None or source.startswith(PACKAGE):
            raise SpecError(
                f"model.source: found {source!r}; accepted: a folder, to which the trained model is written, without peft and "
                "gguf_file."
            )
        return Path(source)

    def save(self, model: nn.Module, place: Path) -> None:
        """Write a model and the tokenizer to a folder."""
        with quiet():
            model.save_pretrained(place)  # type: ignore[operator]
            self._tokenizer().tokenizer.save_pretrained(place)

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the mean cross-entropy [B] of the tokens of each example that count as predicted."""
        sums = self.outputs(model, examples)
        counts = [
            int(example.inputs[PREDICTED][1:].sum()) if PREDICTED in example.inputs else example.size - 1
            for example in examples
        ]
        return sums / sums.new_tensor(counts)

    def examples(self) -> Examples:
        """Read, deduplicate, tokenise and split the examples of [data], and have the model write those it is to write.

        Raises
        ------
        SpecError
            If a length exceeds the model's context, or splits of one source do not read it alike.
        DataError
            If the data cannot be read, is less than declared, or overlaps between splits.
        """
        context = getattr(self._config(weights=True), "max_position_embeddings", None)
        for name, split in self.data.splits().items():
            if context is not None and split.length > context:
                raise SpecError(
                    f"{key_of(name)}.length: found {split.length:,}; {self.model.source} reads at most {context:,} tokens."
                )
        tokenizer = self._tokenizer()
        writer = ModelWriter(load=self.load, end=tokenizer.tokenizer.eos_token_id, source=self.model.source)
        return split_examples(self.data, self.seed, tokenizer, writer)

    def query_reader(self) -> QueryReader:
        """Return what makes examples of texts, prompts with completions, and chats; see `query_examples`."""
        return partial(query_examples, split=self.data.eval, encoder=self._tokenizer())

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the summed cross-entropy [B] of the tokens that count as predicted, of examples of any lengths."""
        import torch

        from gradstore.numerics.outputs import token_cross_entropy

        tokens, mask = _padded(examples, next(model.parameters()).device)
        counted = mask.clone()
        for row, example in enumerate(examples):
            if PREDICTED in example.inputs:
                counted[row, : example.size] = torch.from_numpy(example.inputs[PREDICTED].copy())
        # A prompt is read as any token is, so that its positions carry gradient; it only is not predicted.
        logits = model(input_ids=tokens, attention_mask=_needed(mask), use_cache=False).logits
        return token_cross_entropy(logits, tokens, counted)

    def embeddings(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the mean over an example's tokens of the last hidden states [B, width]."""
        import torch

        tokens, mask = _padded(examples, next(model.parameters()).device)
        with torch.no_grad():
            found = model(
                input_ids=tokens, attention_mask=_needed(mask), use_cache=False, output_hidden_states=True
            ).hidden_states[-1]
        return masked_mean(found, mask)

    def identity(self) -> dict[str, Any]:
        """Return adapter, architecture, tokenizer, output function and how texts are cut.

        Which tokens count as predicted, and what the model wrote, is in the examples, so their hash has it.
        """
        return {
            "adapter": "causal_lm",
            "architecture": self._architecture(),
            **({} if self.model.peft is None else {"peft": lora_identity(self.model.peft)}),
            "tokenizer": self._tokenizer().hash(),
            "output": OUTPUT,
            # Aspects are cut as data.learn is, and may be added to a store.
            "truncation": {
                name: {"packing": split.packing, "length": split.length}
                for name, split in self.data.splits().items()
                if name in SPLITS
            },
        }

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return the name of the language-model head; under an adapter also of the head's own weights inside it."""
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        # PEFT's names for what it has wrapped, and for a head that is trained whole.
        wrapped = [getattr(head, name, None) for name in ("base_layer", "original_module")]
        trained = getattr(head, "modules_to_save", None) or {}
        heads = {id(module) for module in (head, *wrapped, *dict(trained).values()) if module is not None}
        return tuple(name for name, module in model.named_modules() if id(module) in heads)

    def longest(self, split: str) -> int:
        """Return the length that run.toml cuts the split's texts to."""
        return self.data.splits()[split].length

    def _source(self) -> str:
        return find_source(self.model.source, "model.source", "a config.json and weights")

    def _explained(self, role: str = "a causal language model") -> AbstractContextManager[None]:
        return explained(f"model.source: {self.model.source!r}", role=role, holds=_HOLDS)

    def _gguf(self) -> Path | None:
        return None if self.model.gguf_file is None else Path(self._source()) / self.model.gguf_file

    def _folder(self) -> str:
        """A folder or hub id that transformers loads model and tokenizer from."""
        gguf = self._gguf()
        return self._source() if gguf is None else str(dequantise(gguf))

    def _revision(self) -> dict[str, Any]:
        return {"revision": self.model.revision or "main", "trust_remote_code": False}

    def _config(self, *, weights: bool) -> PretrainedConfig:
        """The model's configuration; where the weights are not needed, that of run.toml, and no GGUF file is dequantised."""
        from transformers import AutoConfig

        if self.model.config is not None and not weights:
            with explained(f"model.config: {self.model.config!r}", role="a causal language model", holds=_HOLDS):
                return AutoConfig.from_pretrained(self.model.config, trust_remote_code=False)
        with self._explained():
            gguf = self._gguf()
            if gguf is not None and not weights and not dequantised_folder(gguf).is_dir():
                return read_config(gguf)
            return AutoConfig.from_pretrained(self._folder(), **self._revision())

    def _architecture(self) -> str:
        """Hash of what the configuration says about the computation: weights of one shape may run as several models."""
        config = self._config(weights=True).to_dict()
        return content_hash({key: value for key, value in config.items() if key not in NO_ARCHITECTURE})

    def _tokenizer(self) -> TextTokenizer:
        from transformers import AutoTokenizer

        with self._explained("a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self._folder(), **self._revision())
        return TextTokenizer(tokenizer=tokenizer, source=self.model.source)


def _padded(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] of examples of any lengths, and which of them are no padding."""
    from gradstore.numerics.representation.model import padded

    return padded([example.inputs[TOKENS] for example in examples], device)


def _needed(mask: Tensor) -> Tensor | None:
    """The mask that attention is given: without one it takes its fastest kernel, and a batch of equal lengths needs none."""
    return None if bool(mask.all()) else mask
