"""Causal language models of transformers, on texts: f(x) is the sum of the cross-entropies of an example's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.gguf import dequantise, dequantised_folder
from gradstore.adapters.locations import resolve_location
from gradstore.adapters.protocol import Examples
from gradstore.adapters.splits import TOKENS, split_examples
from gradstore.adapters.tokenizer import TextTokenizer
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PretrainedConfig

OUTPUT: Final = "token_cross_entropy"


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Any causal language model of transformers, from a hub id, a folder, or a GGUF file in a folder.

    Code that comes with a model is never run.
    """

    model: ModelSection
    data: DataSection
    seed: int

    def load(self, device: str) -> nn.Module:
        """Return the model in float32 and evaluation mode; on ``meta`` its shape, with no weights read.

        Raises
        ------
        SpecError
            If the model cannot be found or is no causal language model.
        DataError
            If the weights do not fill the model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self._config(weights=device != "meta")
        with _explained(self.model.source):
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
                    **self._revision(),
                )
                _refuse_unfilled(report, self.model.source)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        loaded: nn.Module = model.eval().to(device)
        return loaded

    def examples(self) -> Examples:
        """Read, deduplicate, tokenise and split the texts of [data].

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
                    f"data.{name}.length: found {split.length:,}; {self.model.source} reads at most {context:,} tokens."
                )
        return split_examples(self.data, self.seed, self._tokenizer())

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the summed token cross-entropy [B] of examples of any lengths."""
        import torch

        from gradstore.numerics.outputs import OUTPUTS

        device = next(model.parameters()).device
        sizes = torch.tensor([example.size for example in examples])
        tokens = torch.zeros(len(examples), int(sizes.max()), dtype=torch.long)
        for row, example in enumerate(examples):
            tokens[row, : example.size] = torch.from_numpy(example.inputs[TOKENS].copy())
        mask = torch.arange(tokens.shape[1]) < sizes[:, None]
        padded = not bool(mask.all())
        tokens, mask = tokens.to(device), mask.to(device)
        # Without a mask attention takes its fastest kernel, and a batch of equal lengths needs none.
        logits = model(input_ids=tokens, attention_mask=mask if padded else None, use_cache=False).logits
        return OUTPUTS[OUTPUT](logits, tokens, mask)

    def identity(self) -> dict[str, Any]:
        """Return adapter, tokenizer, output function and how texts are cut."""
        return {
            "adapter": "causal_lm",
            "tokenizer": self._tokenizer().hash(),
            "output": OUTPUT,
            "truncation": {
                name: {"packing": split.packing, "length": split.length} for name, split in self.data.splits().items()
            },
        }

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return the name of the language-model head."""
        get_head = getattr(model, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        return tuple(name for name, module in model.named_modules() if module is head)

    def _source(self) -> str:
        return resolve_location(self.model.source, "model.source")

    def _gguf(self) -> Path | None:
        return None if self.model.gguf_file is None else Path(self._source()) / self.model.gguf_file

    def _folder(self) -> str:
        """A folder or hub id that transformers loads model and tokenizer from."""
        gguf = self._gguf()
        return self._source() if gguf is None else str(dequantise(gguf))

    def _revision(self) -> dict[str, Any]:
        return {"revision": self.model.revision or "main", "trust_remote_code": False}

    def _config(self, *, weights: bool) -> PretrainedConfig:
        """The model's configuration; where the weights are not needed a GGUF file is not dequantised for it."""
        from transformers import AutoConfig

        with _explained(self.model.source):
            if self.model.config is not None:
                return AutoConfig.from_pretrained(self.model.config, trust_remote_code=False)
            gguf = self._gguf()
            if gguf is not None and not weights and not dequantised_folder(gguf).is_dir():
                return AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            return AutoConfig.from_pretrained(self._folder(), **self._revision())

    def _tokenizer(self) -> TextTokenizer:
        from transformers import AutoTokenizer

        with _explained(self.model.source):
            tokenizer = AutoTokenizer.from_pretrained(self._folder(), **self._revision())
        return TextTokenizer(tokenizer=tokenizer, source=self.model.source)


def _refuse_unfilled(report: dict[str, Any], source: str) -> None:
    """What a checkpoint lacks transformers fills with random numbers, and only warns."""
    missing = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind])
    if missing:
        raise DataError(
            f"model.source: the weights of {source} lack {len(missing)} tensors of the model: {', '.join(missing[:5])}. "
            "Name a checkpoint of a causal language model."
        )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what transformers raises about a model it cannot load into one error, without its progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise SpecError(
            f"model.source: {source!r} does not load as a causal language model: {error}\n"
            "Name a folder with a config.json and weights, or a hub id that this machine can reach."
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
