"""Classifiers of images: a user's own torch module, or one of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.causal_lm import NO_ARCHITECTURE
from gradstore.adapters.images.classes import Classes
from gradstore.adapters.images.mislabelling import mislabelled
from gradstore.adapters.images.pixels import COLOUR, GRAY, Preparation, resolve_preparation
from gradstore.adapters.images.splits import CLASS, IMAGE, Labelled, blank_image, split_images
from gradstore.adapters.models.modules import KeptInAFile, fill, is_function, make_module
from gradstore.adapters.models.pretrained import explained, find_source, refuse_unfilled
from gradstore.adapters.protocol import Examples
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, ModelSection, content_hash, key_of, resolve_kind
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig

CROSS_ENTROPY: Final = "cross_entropy"
MARGIN: Final = "margin"
_HOLDS: Final = "a config.json and weights of an image classifier"
# What transformers calls classes that it does not know.
_UNNAMED: Final = "LABEL_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOptions:
    """[model.options]: how a classifier is made, and how images become its inputs.

    Attributes
    ----------
    arguments
        What the function that makes the model is called with.
    mean, std
        Subtracted from, and divided into, pixels scaled to [0, 1]: one number, or one per channel.
    size
        One number or [height, width]: images are resized to it. Without it all must have one shape.
    channels
        3 or 1: images are converted to it. Without it all must have one number of channels.
    classes
        The names of the classes in the order of the model's outputs.
    mislabelled
        The share of the train images that are given a wrong label, to be looked for by ``gradstore evaluate mislabel``.
    """

    arguments: dict[str, Any] | None = None
    mean: float | list[float] = 0.0
    std: float | list[float] = 1.0
    size: int | list[int] | None = None
    channels: int | None = None
    classes: list[str] | None = None
    mislabelled: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageClassifier(KeptInAFile):
    """A classifier whose f(x) is the cross-entropy of an image's class, or its margin log(p / (1 - p)).

    ``model.source`` is a function that makes a torch module (``package.module:function``), or a folder or hub id of
    transformers; ``model.weights`` is a file of weights, read as tensors only, for either. A function that fills its module
    itself needs none. Code that comes with a model of the hub is never run.
    """

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        if self.model.output not in (None, CROSS_ENTROPY, MARGIN):
            raise SpecError(
                f"model.output: found {self.model.output!r}; accepted: {CROSS_ENTROPY} (default), {MARGIN}."
            )
        for key in ("peft", "gguf_file", *(["config"] if is_function(self.model.source) else [])):
            if getattr(self.model, key) is not None:
                raise SpecError(f"model.{key}: image_classifier has no such key.")
        if self._options().arguments and not is_function(self.model.source):
            raise SpecError(
                f"model.options.arguments: {self.model.source!r} is no function (package.module:function) to be called "
                "with them."
            )
        if not 0 <= self._options().mislabelled < 1:
            raise SpecError(
                f"model.options.mislabelled: found {self._options().mislabelled}; accepted: a share from 0 to less than 1."
            )
        self._preparation()
        self._normalisation()

    def load(self, device: str) -> nn.Module:
        """Return the model in float32 and evaluation mode; on ``meta`` its shape, with no file of weights read.

        Raises
        ------
        SpecError
            If the model cannot be found or made, or is no classifier of images.
        DataError
            If the weights are damaged or do not fill the model.
        """
        from torch import nn

        model = self._made(shape_only=device == "meta")
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
                module.p = 0.0
        return model.eval().to(device)

    def fresh(self, seed: int, device: str) -> nn.Module:
        """Return the model as its function or its configuration makes it, with random parameters of the seed."""
        from gradstore.numerics.training import seeded

        with seeded(seed):
            function = is_function(self.model.source)
            module = self._made(shape_only=True) if function else self._from_config(shape_only=False)
        return module.to(device)

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the cross-entropy [B] of images, whatever the run's output function is."""
        return self._outputs(model, examples, CROSS_ENTROPY)

    def examples(self) -> Examples:
        """Read, deduplicate and split the images of [data].

        Raises
        ------
        SpecError
            If the model cannot be run on the images, or has another number of classes.
        DataError
            If the data cannot be read, lacks labels, is less than declared, or overlaps between splits.
        """
        labelled = Labelled.read(self.data)
        classes = self._classes(labelled)
        examples = split_images(labelled, classes, self._preparation(), self.seed)
        self._refuse_other_classes(classes, examples)
        if share := self._options().mislabelled:
            wrong = mislabelled(examples.splits["train"], classes, share, self.seed)
            examples = replace(examples, splits={**examples.splits, "train": wrong})
        return examples

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the cross-entropy or the margin [B] of images of one shape."""
        return self._outputs(model, examples, self._output)

    def embeddings(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return what enters the model's last linear layer [B, width], averaged over positions where it has some."""
        import torch
        from torch import nn

        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not heads:
            raise SpecError(
                f"model.source: {self.model.source} has no linear layer, before which an image would have an embedding. Leave "
                '"embedding" out of evaluate.baselines.'
            )
        entered: list[Tensor] = []
        with torch.no_grad(), heads[-1].register_forward_pre_hook(lambda _, given: entered.append(given[0])):
            self._logits(model, examples)
        return entered[-1].reshape(len(examples), -1, heads[-1].in_features).mean(1)

    def _outputs(self, model: nn.Module, examples: Sequence[Example], function: str) -> Tensor:
        import numpy as np
        import torch

        from gradstore.numerics.outputs import OUTPUTS

        classes = torch.from_numpy(np.stack([example.inputs[CLASS] for example in examples]))
        logits = self._logits(model, examples)
        return OUTPUTS[function](logits, classes.to(logits.device))

    def identity(self) -> dict[str, Any]:
        """Return adapter, architecture, output function, preprocessing and the order of the classes.

        The order is None where labels are the numbers of the outputs.
        """
        preparation, (mean, std) = self._preparation(), self._normalisation()
        classes = self._classes(Labelled.read(self.data))
        return {
            "adapter": "image_classifier",
            "architecture": self._architecture(),
            "output": self._output,
            "preprocessing": {
                "mean": mean,
                "std": std,
                "size": None if preparation.size is None else list(preparation.size),
                "channels": preparation.channels,
            },
            "classes": None if classes.names is None else list(classes.names),
        }

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: a classifier's last layer is small, and one of the groups in the paper's experiments."""
        return ()

    def longest(self, split: str) -> None:
        """Return None: the images tell."""

    def blank(self) -> Example | None:
        """Return a black image, where size and channels are declared."""
        return blank_image(self._preparation())

    @property
    def _output(self) -> str:
        return self.model.output or CROSS_ENTROPY

    def _logits(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        import numpy as np
        import torch

        parameter = next(model.parameters())
        pixels = torch.from_numpy(np.stack([example.inputs[IMAGE] for example in examples]))
        images = pixels.to(parameter.device).to(parameter.dtype).div_(255)
        images = self._normalised(images)
        try:
            logits = model(images)
        except torch.OutOfMemoryError:
            raise
        # What a module says of a shape that it cannot take.
        except (RuntimeError, ValueError) as error:
            raise SpecError(
                f"model.source: {self.model.source} cannot be run on images of {list(images.shape[1:])} [channels, height, "
                f"width]: {error}. Set model.options.channels and model.options.size to what it takes."
            ) from error
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(examples):
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise SpecError(
                f"model.source: {self.model.source} returns {found} for {len(examples)} images; a classifier returns one "
                "score per class, [images, classes]."
            )
        return logits

    def _normalised(self, images: Tensor) -> Tensor:
        for name, values in zip(("mean", "std"), self._normalisation(), strict=True):
            if len(values) not in (1, images.shape[1]):
                raise SpecError(
                    f"model.options.{name}: found {len(values)} values, images have {images.shape[1]} channel(s). Give one "
                    "value or one per channel, or set model.options.channels."
                )
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in self._normalisation())
        return (images - mean) / std

    def _made(self, *, shape_only: bool) -> nn.Module:
        weights = None if shape_only else self.model.weights
        if is_function(self.model.source):
            # Made in full where its shape is asked for, too: a user's function may look at values, which meta has not.
            module = make_module(self.model.source, self._options().arguments or {})
        elif shape_only or weights is not None:
            module = self._from_config(shape_only=shape_only)
        else:
            module = self._pretrained()
        if weights is not None:
            fill(module, weights)
        return module

    def _from_config(self, *, shape_only: bool) -> nn.Module:
        import torch
        from transformers import AutoModelForImageClassification

        config = self._config(shape_only=shape_only)
        with self._explained(), torch.device("meta" if shape_only else "cpu"):
            module: nn.Module = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        return module

    def _pretrained(self) -> nn.Module:
        import torch
        from transformers import AutoModelForImageClassification

        config = self._config()
        with self._explained():
            module, report = AutoModelForImageClassification.from_pretrained(
                self._source(),
                config=config,
                dtype=torch.float32,
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
            "an image classifier",
        )
        loaded: nn.Module = module
        return loaded

    def _config(self, *, shape_only: bool = False) -> PretrainedConfig:
        """The configuration; where the shape alone is asked for that of run.toml, if it names one."""
        from transformers import AutoConfig

        if shape_only and self.model.config is not None:
            with explained(f"model.config: {self.model.config!r}", role="an image classifier", holds=_HOLDS):
                return AutoConfig.from_pretrained(self.model.config, trust_remote_code=False)
        with self._explained():
            return AutoConfig.from_pretrained(self._source(), **self._revision())

    def _source(self) -> str:
        return find_source(self.model.source, "model.source", _HOLDS)

    def _revision(self) -> dict[str, Any]:
        return {"revision": self.model.revision or "main", "trust_remote_code": False}

    def _explained(self) -> AbstractContextManager[None]:
        holds = f"{_HOLDS}, a function (package.module:function)"
        return explained(f"model.source: {self.model.source!r}", role="an image classifier", holds=holds)

    def _architecture(self) -> dict[str, Any]:
        """The function and its arguments, or a hash of what the configuration says about the computation."""
        if is_function(self.model.source):
            return {"source": self.model.source, "arguments": content_hash(self._options().arguments or {})}
        config = self._config().to_dict()
        return {"config": content_hash({key: value for key, value in config.items() if key not in NO_ARCHITECTURE})}

    def _classes(self, labelled: Labelled) -> Classes:
        return labelled.classes(declared=self._options().classes, learned=self._learned_names())

    def _learned_names(self) -> list[str] | None:
        """The names that a model of transformers gives its outputs."""
        if is_function(self.model.source):
            return None
        names = [str(name) for _, name in sorted(self._config().id2label.items())]
        return None if any(name.startswith(_UNNAMED) for name in names) else names

    def _refuse_other_classes(self, classes: Classes, examples: Examples) -> None:
        """Run the model once on one image, with whatever weights, to see how many outputs it has."""
        import torch

        every = [(name, example) for name, found in examples.splits.items() for example in found]
        function = is_function(self.model.source)
        model = self._made(shape_only=True) if function else self._from_config(shape_only=False)
        with torch.no_grad():
            outputs = self._logits(model.eval(), [every[0][1]]).shape[1]
        if outputs < 2:
            raise SpecError(
                f"model.source: {self.model.source} has {outputs} output; a classifier needs one for each class, and at "
                "least two."
            )
        if classes.names is not None and len(classes.names) != outputs:
            raise SpecError(
                f"model.source: {self.model.source} has {outputs:,} outputs, the data {len(classes.names):,} classes: "
                f"{', '.join(classes.names[:10])}. Name the class of every output in model.options.classes."
            )
        for name, example in every:
            if (number := int(example.inputs[CLASS])) >= outputs:
                raise DataError(
                    f"{key_of(name)}: the label of {example.example_id} is {number}, but {self.model.source} has {outputs:,} "
                    "outputs, numbered from 0."
                )

    def _options(self) -> ImageOptions:
        kinds = {"image_classifier": ImageOptions}
        return resolve_kind(kinds, "image_classifier", self.model.options, "model.options")

    def _preparation(self) -> Preparation:
        options = self._options()
        return resolve_preparation(options.size, options.channels)

    def _normalisation(self) -> tuple[list[float], list[float]]:
        """(mean, std), each of one number or of one per channel."""
        options = self._options()
        mean, std = (list(values) if isinstance(values, list) else [values] for values in (options.mean, options.std))
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (GRAY, COLOUR) or (name == "std" and min(values) <= 0):
                raise SpecError(
                    f"model.options.{name}: found {values}; accepted: one number or one per channel"
                    f"{', above 0' if name == 'std' else ''}."
                )
        return mean, std
