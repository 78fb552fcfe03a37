"""Encoders of texts: the features of an example are what an encoder makes of it, not a gradient of the attributed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

import numpy as np

from gradstore.adapters.causal_lm import NO_ARCHITECTURE, CausalLM
from gradstore.adapters.encoder.layout import Layout, write_layout
from gradstore.adapters.locations import PACKAGE
from gradstore.adapters.models.pretrained import explained, find_source, quiet, refuse_unfilled
from gradstore.adapters.protocol import Adapter, Examples, QueryReader
from gradstore.adapters.text.queries import query_examples
from gradstore.adapters.text.records import resolve_form
from gradstore.adapters.text.splits import split_examples
from gradstore.adapters.text.tokenizer import TextTokenizer
from gradstore.errors import DataError, SpecError
from gradstore.spec import SPLITS, DataSection, ModelSection, content_hash, key_of, resolve_kind
from gradstore.store.examples import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

OUTPUT: Final = "representation"
_HOLDS: Final = "a config.json, weights and a tokenizer"
_ROLE: Final = "an encoder of texts"
_UNHEARD: Final = ("weights", "optimizer", "peft", "gguf_file")
# Tokenizers that know no bound say a number that is none.
_BOUNDLESS: Final = 10**6


@runtime_checkable
class Represents(Protocol):
    """An adapter whose features stand for examples, and not for what a model learns of them."""

    def attributed(self) -> Adapter | None:
        """Return the adapter of the model that is attributed; None where run.toml names none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """[model.options].

    Attributes
    ----------
    attributed
        Keys of [model] of the causal language model that is attributed: its tokenizer cuts texts into examples, so that they
        are those of its own run. Without it they are cut by the encoder's tokenizer.
    pooling
        ``mean`` of the states of tokens, the ``first`` or the ``last``; as the encoder's modules.json says unless given.
    layers
        Hidden states that are pooled, each a parameter group: the ``last``, ``all``, or their numbers, 0 being the embeddings
        of tokens.
    normalize
        Whether representations are divided by their norms; as modules.json says unless given.
    context
        Most tokens of the encoder's own tokenizer that it reads of a text; as many as it can unless given.
    truncate
        Whether longer texts are cut to these, rather than refused.
    """

    attributed: dict[str, Any] | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    layers: Literal["last", "all"] | list[int] = "last"
    normalize: bool | None = None
    context: int | None = None
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """Any encoder of transformers or sentence-transformers, from a hub id or a folder; also hidden states of a language model.

    Code that comes with a model is never run.
    """

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        if self.model.output not in (None, OUTPUT):
            raise SpecError(f"model.output: found {self.model.output!r}; text_encoder has {OUTPUT} alone.")
        for key in _UNHEARD:
            if getattr(self.model, key) is not None:
                raise SpecError(f"model.{key}: text_encoder has no such key. Its weights are those of model.source.")
        options = self._options()
        if options.context is not None and options.context < 1:
            raise SpecError(f"model.options.context: found {options.context}; accepted: a number of at least 1.")
        if options.layers == [] or (isinstance(options.layers, list) and len({*options.layers}) < len(options.layers)):
            raise SpecError(f"model.options.layers: found {options.layers}; accepted: different numbers of layers.")
        if self.attributed() is not None:
            return
        for name, split in self.data.splits().items():
            if split.generate is not None:
                raise SpecError(
                    f"{key_of(name)}.generate: an encoder writes no texts. Name the model that does in model.options.attributed."
                )
            resolve_form(split, key_of(name))

    def attributed(self) -> CausalLM | None:
        """Return the adapter of the model that is attributed."""
        keys = self._options().attributed
        if keys is None:
            return None
        if keys.get("adapter", "causal_lm") != "causal_lm":
            raise SpecError(
                f"model.options.attributed.adapter: found {keys['adapter']!r}; accepted: causal_lm, or no such key."
            )
        from pydantic import ValidationError

        from gradstore.spec.reading import explain

        try:
            section = ModelSection.model_validate(keys)
        except ValidationError as error:
            raise SpecError(explain(error, keys, None, "model.options.attributed")) from error
        return CausalLM(section, self.data, self.seed)

    def load(self, device: str) -> nn.Module:
        """Return the encoder with its probes, in float32 and evaluation mode; on ``meta`` its shape, with no weights read.

        Raises
        ------
        SpecError
            If the encoder cannot be found, or is none, or has not the layers that are asked for.
        DataError
            If the weights are damaged or do not fill it.
        """
        import torch
        from transformers import AutoModel

        from gradstore.numerics.representation.model import Reading, Representation

        config, layout, options = self._config(), self.layout(), self._options()
        with self._explained():
            if device == "meta":
                with torch.device("meta"):
                    encoder = AutoModel.from_config(config, dtype=torch.float32)
            else:
                encoder, report = AutoModel.from_pretrained(
                    self._source(),
                    config=config,
                    dtype=torch.float32,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **self._revision(),
                )
                # A pooler is made of nothing by models that come without one, and is not used.
                missing = [str(name) for name in report["missing_keys"] if not str(name).startswith("pooler.")]
                mismatched = [
                    f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
                ]
                refuse_unfilled("model.source", self.model.source, missing, mismatched, _ROLE)
        dense = layout.open_dense(self._source(), self._revision()["revision"], shape_only=device == "meta")
        reading = Reading(
            layers=self._layers(config, layout),
            pooling=options.pooling or layout.pooling,
            normalize=layout.normalize if options.normalize is None else options.normalize,
            context=self.context(),
        )
        made = Representation(_without_pooler(encoder), dense, reading)
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return made.eval().to(device)

    def examples(self) -> Examples:
        """Read, deduplicate, tokenise and split the examples of [data], as the attributed model's own run does.

        Raises
        ------
        SpecError
            If splits of one source do not read it alike.
        DataError
            If the data cannot be read, is less than declared, or overlaps between splits; or a text is longer than the encoder
            reads, and is not to be cut.
        """
        attributed = self.attributed()
        found = (
            split_examples(self.data, self.seed, self._cutter(), _NoWriter())
            if attributed is None
            else attributed.examples()
        )
        if not self._options().truncate:
            self.refuse_longer(found.splits)
        return found

    def query_reader(self) -> QueryReader:
        """Return what makes examples of texts, cut as those of data.eval are; texts that are too long for the encoder are refused."""
        attributed, cutter = self.attributed(), self._cutter()
        inner = None if attributed is None else attributed.query_reader()

        def read(records: Sequence[Mapping[str, Any]], *, truncate: bool) -> list[Example]:
            if inner is None:
                found = query_examples(records, split=self.data.eval, encoder=cutter, truncate=truncate)
            else:
                found = inner(records, truncate=truncate)
            if not (truncate or self._options().truncate):
                self.refuse_longer({"eval": found})
            return found

        return read

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return f [B], which is zero, with the representations as its gradients."""
        read: Any = model
        found: Tensor = model(*self.tokens(examples, next(model.parameters()).device, read.reading.context))
        return found

    def tokens(self, examples: Sequence[Example], device: torch.device, context: int) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, T] that the encoder reads of the texts of examples, and which of them are no padding."""
        from gradstore.numerics.representation.model import padded

        return padded(self.encode([example.text for example in examples], context), device)

    def encode(self, texts: Sequence[str], context: int) -> list[np.ndarray]:
        """Return the tokens of texts by the encoder's own tokenizer, at most ``context`` of each."""
        return [np.array(row, np.int64) for row in _encode(self._tokenizer(), texts, context)]

    def identity(self) -> dict[str, Any]:
        """Return the encoder's architecture, tokenizer and width, what is made of its states, and how texts are cut."""
        config, layout, options, attributed = self._config(), self.layout(), self._options(), self.attributed()
        architecture = {key: value for key, value in config.to_dict().items() if key not in NO_ARCHITECTURE}
        cut = {
            name: {"packing": split.packing, "length": split.length}
            for name, split in self.data.splits().items()
            if name in SPLITS
        }
        return {
            "adapter": "text_encoder",
            "output": OUTPUT,
            "architecture": content_hash(architecture),
            "tokenizer": self._cutter().hash(),
            "width": layout.dense[2] if layout.dense is not None else int(config.hidden_size),
            "pooling": options.pooling or layout.pooling,
            "normalize": layout.normalize if options.normalize is None else options.normalize,
            "context": self.context(),
            "truncation": cut,
            "cut_by": None if attributed is None else attributed.identity()["tokenizer"],
        }

    def saved_place(self) -> Path:
        """Return the folder that ``model.source`` names."""
        if self.model.source.startswith(PACKAGE):
            raise SpecError(
                f"model.source: found {self.model.source!r}; accepted: a folder, to which the trained encoder is written."
            )
        return Path(self.model.source)

    def save(self, model: nn.Module, place: Path) -> None:
        """Write the encoder, its tokenizer and its linear layer to a folder, as sentence-transformers has them."""
        made: Any = model
        with quiet():
            made.encoder.save_pretrained(place)
            self._tokenizer().save_pretrained(place)
        write_layout(place, made.reading, width=int(made.encoder.config.hidden_size), dense=made.dense)

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: every probe is a group, and the encoder is frozen."""
        return ()

    def longest(self, split: str) -> int:
        """Return the length that run.toml cuts the split's texts to."""
        return self.data.splits()[split].length

    def context(self) -> int:
        """Return the most tokens that the encoder reads of a text, its special tokens among them."""
        options, config = self._options(), self._config()
        bounds = [
            self.layout().longest,
            getattr(config, "max_position_embeddings", None),
            self._tokenizer().model_max_length,
        ]
        known = [bound for bound in bounds if bound is not None and bound < _BOUNDLESS]
        most = min(known, default=_BOUNDLESS)
        if options.context is not None and options.context > min(known[1:] or known, default=_BOUNDLESS):
            raise SpecError(
                f"model.options.context: found {options.context:,}; {self.model.source} reads at most {most:,} tokens."
            )
        return options.context or most

    def layout(self) -> Layout:
        """Return how the encoder's hidden states become a representation."""
        with self._explained():
            return Layout.read(self._source(), self._revision()["revision"])

    def _layers(self, config: PretrainedConfig, layout: Layout) -> list[int]:
        asked, last = self._options().layers, int(config.num_hidden_layers)
        layers = [last] if asked == "last" else [*range(1, last + 1)] if asked == "all" else [*asked]
        if strange := [layer for layer in layers if not 0 <= int(layer) <= last]:
            raise SpecError(
                f"model.options.layers: found {strange[0]}; {self.model.source} has hidden states 0 to {last}."
            )
        if layout.dense is not None and layers != [last]:
            raise SpecError(
                f'model.options.layers: found {asked!r}, and {self.model.source} has a linear layer on its last states; accepted: "last".'
            )
        return [int(layer) for layer in layers]

    def refuse_longer(self, splits: Mapping[str, Sequence[Example]]) -> None:
        """Refuse a text that is longer than the encoder reads; DataError names the first, and how many there are."""
        context, tokenizer = self.context(), self._tokenizer()
        for name, rows in splits.items():
            sizes = [len(row) for row in _encode(tokenizer, [example.text for example in rows], None)]
            longer = [place for place, size in enumerate(sizes) if size > context]
            if longer:
                first = longer[0]
                raise DataError(
                    f"{key_of(name)}: {rows[first].example_id} has {sizes[first]:,} tokens, and {self.model.source} reads at most "
                    f"{context:,}; {len(longer):,} of {len(rows):,} texts are longer. Set model.options.truncate = true to have them "
                    f"cut, or lower {key_of(name)}.length."
                )

    def _cutter(self) -> TextTokenizer:
        return TextTokenizer(tokenizer=self._tokenizer(), source=self.model.source)

    def _options(self) -> EncoderOptions:
        return resolve_kind({"text_encoder": EncoderOptions}, "text_encoder", self.model.options, "model.options")

    def _source(self) -> str:
        return find_source(self.model.source, "model.source", _HOLDS)

    def _explained(self) -> AbstractContextManager[None]:
        return explained(f"model.source: {self.model.source!r}", role=_ROLE, holds=_HOLDS)

    def _revision(self) -> dict[str, Any]:
        return {"revision": self.model.revision or "main", "trust_remote_code": False}

    def _config(self) -> PretrainedConfig:
        from transformers import AutoConfig

        with self._explained():
            config: PretrainedConfig = AutoConfig.from_pretrained(self._source(), **self._revision())
        if getattr(config, "is_encoder_decoder", False):
            raise SpecError(
                f"model.source: {self.model.source} is an encoder with a decoder; accepted: one whose hidden states are of its input."
            )
        return config

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        with self._explained():
            return _read_tokenizer(self._source(), self._revision()["revision"])


class _NoWriter:
    """Stands where a model would continue prompts; splits that ask for that were refused."""

    def write(self, *_: object) -> Any:
        raise AssertionError("an encoder writes no texts")


@lru_cache(maxsize=2)
def _read_tokenizer(source: str, revision: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    return found


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None) -> list[list[int]]:
    cut = {} if longest is None or longest >= _BOUNDLESS else {"truncation": True, "max_length": longest}
    found: list[list[int]] = tokenizer(
        [*texts], return_attention_mask=False, return_token_type_ids=False, verbose=False, **cut
    )["input_ids"]
    return found


def _without_pooler(encoder: Any) -> nn.Module:
    """The encoder without the layer that some families have on their first state, which may be of random numbers."""
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    made: nn.Module = encoder
    return made
