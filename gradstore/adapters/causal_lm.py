"""Causal language models of transformers, on texts: f(x) is the sum of the cross-entropies of an example's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.gguf import dequantise, dequantised_folder, read_config
from gradstore.adapters.locations import resolve_location
from gradstore.adapters.protocol import Examples
from gradstore.adapters.splits import TOKENS, split_examples
from gradstore.adapters.tokenizer import TextTokenizer
from gradstore.errors import DataError, GradstoreError, SpecError
from gradstore.spec import DataSection, ModelSection, content_hash
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from transformers import PretrainedConfig

OUTPUT: Final = "token_cross_entropy"

# Where a configuration came from, and how it is kept.
NO_ARCHITECTURE: Final = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
)


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
            If the weights are damaged or do not fill the model.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = self._config(weights=device != "meta")
        with _explained(f"model.source: {self.model.source!r}"):
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
        """Return adapter, architecture, tokenizer, output function and how texts are cut."""
        return {
            "adapter": "causal_lm",
            "architecture": self._architecture(),
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
        source = resolve_location(self.model.source, "model.source")
        # A hub id is NAME or OWNER/NAME; whatever else there is must be a folder.
        if (source.startswith(("/", ".", "~")) or source.count("/") > 1) and not Path(source).is_dir():
            raise SpecError(
                f"model.source: {self.model.source!r}: there is no such folder. Name a folder with a config.json and "
                "weights, or a hub id."
            )
        return source

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
            with _explained(f"model.config: {self.model.config!r}"):
                return AutoConfig.from_pretrained(self.model.config, trust_remote_code=False)
        with _explained(f"model.source: {self.model.source!r}"):
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

        with _explained(f"model.source: {self.model.source!r}", role="a tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self._folder(), **self._revision())
        return TextTokenizer(tokenizer=tokenizer, source=self.model.source)


def _refuse_unfilled(report: dict[str, Any], source: str) -> None:
    """What a checkpoint lacks or has in another shape transformers fills with random numbers, and only warns."""
    missing = sorted(str(name) for name in report["missing_keys"])
    mismatched = sorted(f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"])
    for names, what in ((missing, "lack {} tensors"), (mismatched, "have the wrong shape for {} tensors")):
        if names:
            raise DataError(
                f"model.source: the weights of {source} {what.format(len(names))} of the model: {', '.join(names[:5])}. "
                "Name a checkpoint of a causal language model."
            )


@contextmanager
def _explained(named: str, *, role: str = "a causal language model") -> Iterator[None]:
    """Turn what transformers raises about a model it cannot load into one error, without its progress bars and tables."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (GradstoreError, MemoryError):
        raise
    except SafetensorError as error:
        raise DataError(f"{named} holds damaged weights: {error}. Fetch or copy the model again.") from error
    # A broken file makes the readers of its format fail in any way: struct.error, IndexError, KeyError and others.
    except Exception as error:
        raise SpecError(
            f"{named} does not load as {role}: {error}\n"
            "Name a folder with a config.json, weights and a tokenizer, or a hub id that this machine can reach."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
