"""Diffusion models of images: a UNet that a user's own function makes, or one that diffusers saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.adapters.diffusion.calling import predict_noise
from gradstore.adapters.diffusion.diffusers_models import SavedUnet
from gradstore.adapters.diffusion.options import DiffusionOptions
from gradstore.adapters.diffusion.sampler import Sampling, resolve_sampling
from gradstore.adapters.diffusion.schedule import Copies, Schedule, evenly_spaced
from gradstore.adapters.diffusion.splits import LAST, PATH, TIMES, Wanted, refuse_equal_samples, sampled_split, sized
from gradstore.adapters.diffusion.training import classes_of, denoising_losses
from gradstore.adapters.images.classes import Classes
from gradstore.adapters.images.splits import CLASS, IMAGE, Labelled, blank_image, split_images
from gradstore.adapters.models.lora import lora_identity, wrap_in_lora
from gradstore.adapters.models.modules import KeptInAFile, fill, is_function, make_module
from gradstore.adapters.protocol import Examples
from gradstore.errors import SpecError
from gradstore.spec import DataSection, ModelSection, content_hash, key_of, resolve_kind
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn

SIMPLE: Final = "ddpm_simple"
DAS: Final = "das"
OUTPUT_NAMES: Final = (SIMPLE, "square", DAS)
# Of what a copy takes, the part that the extractor of gradients keeps of it, projected, after its call: measured with
# 32 and 64 channels and logra of rank 8. It is less in a wider model.
KEPT_SHARE: Final = 0.25
# The argument of diffusers' UNets that takes the class.
_CLASS_LABELS: Final = "class_labels"


# Without slots, as what run.toml says is resolved once and kept: outputs are asked for once a batch.
@dataclass(frozen=True)
class Diffusion(KeptInAFile):
    """A diffusion model whose f(x) is a mean over noised copies of x, the same timesteps and noises for every image.

    ``model.source`` is a function that makes a torch module (``package.module:function``), which is called with noisy
    images [n, C, H, W] in [-1, 1] and their timesteps [n] and returns the noise in them, or an object whose ``sample``
    that is; or a folder or hub id of diffusers. ``model.weights`` is a file of weights, read as tensors only, for either.
    Of a function the schedule is told in [model.options], of diffusers it is the saved one.

    Images are those of data.*; of all but data.train a table ``generate`` has the model make them. Where that keeps
    the trajectory, such an image is seen in the noisy images that its sampling went through (Journey-TRAK, arXiv
    2506.05647, eq. 15), at the timesteps that are listed or at all, and not in copies that are noised anew.
    """

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        if self.model.output not in (None, *OUTPUT_NAMES):
            raise SpecError(
                f"model.output: found {self.model.output!r}; accepted: {SIMPLE} (default), {', '.join(OUTPUT_NAMES[1:])}."
            )
        for key in ("gguf_file", *(["config"] if is_function(self.model.source) else [])):
            if getattr(self.model, key) is not None:
                raise SpecError(f"model.{key}: diffusion has no such key.")
        options = self._options
        if options.arguments and not is_function(self.model.source):
            raise SpecError(
                f"model.options.arguments: {self.model.source!r} is no function (package.module:function) to be called "
                "with them."
            )
        options.preparation()
        if is_function(self.model.source):
            self._options.resolve_copies(self._schedule, self.seed)
            self._samplings()

    def load(self, device: str) -> nn.Module:
        """Return the model in float32 and evaluation mode; on ``meta`` its shape, with no file of weights read.

        Raises
        ------
        SpecError
            If the model cannot be found or made, or an adapter does not fit it.
        DataError
            If the weights are damaged or do not fill the model.
        """
        return self._made(shape_only=device == "meta", filled=True).to(device)

    def examples(self) -> Examples:
        """Read, deduplicate and split the images of [data], and make those that are generated.

        Raises
        ------
        SpecError
            If the model cannot be run on the images.
        DataError
            If the data cannot be read, lacks labels that the model needs, is less than declared, or overlaps between
            splits.
        """
        samplings, options = self._samplings(), self._options
        labelled = Labelled.read(self.data, omit=samplings)
        classes = self._classes(labelled)
        found = split_images(labelled, classes, options.preparation(), self.seed)
        self._refuse_what_the_model_cannot_take(found)
        made = self._sampled(samplings, found.splits["train"], classes)
        refuse_equal_samples(made)
        every = {**found.splits, **made}
        splits = {name: [self._sized(example) for example in every[name]] for name in self.data.splits()}
        rows = {name: len(examples) for name, examples in splits.items()}
        return Examples(splits=splits, facts=replace(found.facts, rows=rows))

    def training_examples(self) -> Sequence[Example]:
        """Return the images of data.train, for which no model has to make others."""
        labelled = Labelled.read(self.data, omit=self._samplings())
        found = split_images(labelled, self._classes(labelled), self._options.preparation(), self.seed)
        return [self._sized(example) for example in found.splits["train"]]

    def fresh(self, seed: int, device: str) -> nn.Module:
        """Return the model as its function or its configuration makes it, with random parameters of the seed."""
        from gradstore.numerics.training import seeded

        if self.model.peft is not None:
            raise SpecError("model.peft: a model with an adapter is not made anew. Name a trainer of your own.")
        with seeded(seed):
            return self._made(shape_only=False, filled=False).to(device)

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return the error of the noise that the model sees in each image [B], at a random timestep."""
        like = next(model.parameters())
        return denoising_losses(partial(self._call, model), examples, self._schedule.levels, like)

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return f [B] of images of one shape, each seen in its noised copies."""
        return self.outputs_and_residuals(model, examples)[0]

    def outputs_and_residuals(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None]:
        """Return f [B] and, of the output function of DAS, how far the noise is that the model sees in the same copies."""
        from gradstore.numerics.outputs import OUTPUTS
        from gradstore.numerics.outputs.diffusion import residual

        noisy, noise, times = self._noised(model, examples)
        predicted = self._predicted(model, noisy, times, classes_of(examples))
        output = OUTPUTS[self._output](predicted, *([noise] if self._output == SIMPLE else []))
        return output, residual(predicted, noise) if self._output == DAS else None

    def identity(self) -> dict[str, Any]:
        """Return adapter, architecture, output function, schedule, copies, preprocessing and the order of the classes."""
        options = self._options
        copies, preparation = self._copies, options.preparation()
        classes = self._classes(Labelled.read(self.data, omit=self._samplings())) if self._argument else None
        return {
            "adapter": "diffusion",
            "architecture": self._architecture(),
            "peft": None if self.model.peft is None else lora_identity(self.model.peft),
            "output": self._output,
            "schedule": dict(self._schedule.facts),
            "copies": {"timesteps": list(copies.timesteps), "noises": copies.noises, "seed": copies.seed},
            "preprocessing": {
                "size": None if preparation.size is None else list(preparation.size),
                "channels": preparation.channels,
            },
            "class_argument": self._argument,
            "classes": None if classes is None or classes.names is None else list(classes.names),
        }

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: the last convolution of a UNet is small."""
        return ()

    def longest(self, split: str) -> None:
        """Return None: the images tell."""

    def blank(self) -> Example | None:
        """Return a black image in its copies, where size and channels are declared."""
        found = blank_image(self._options.preparation())
        return None if found is None else self._sized(found)

    @property
    def _output(self) -> str:
        return self.model.output or SIMPLE

    @cached_property
    def _options(self) -> DiffusionOptions:
        return resolve_kind({"diffusion": DiffusionOptions}, "diffusion", self.model.options, "model.options")

    @property
    def _saved(self) -> SavedUnet | None:
        """The model of diffusers that run.toml names, None of a function."""
        if is_function(self.model.source):
            return None
        return SavedUnet(source=self.model.source, revision=self.model.revision, config=self.model.config)

    @cached_property
    def _schedule(self) -> Schedule:
        return self._options.resolve_schedule(None if self._saved is None else self._saved.schedule())

    @cached_property
    def _copies(self) -> Copies:
        return self._options.resolve_copies(self._schedule, self.seed)

    def _samplings(self) -> dict[str, Sampling]:
        """How the splits are made that are not read.

        Raises
        ------
        SpecError
            If a table is none, or the trajectory that it keeps does not go through a timestep that is listed.
        """
        found: dict[str, Sampling] = {}
        for name, split in self.data.splits().items():
            sampling = resolve_sampling(split, key_of(name), self._schedule.steps)
            if sampling is None:
                continue
            found[name] = sampling
            listed = self._options.timesteps
            passed = evenly_spaced(sampling.steps, self._schedule.steps)
            if sampling.trajectory and isinstance(listed, list) and (missed := [t for t in listed if t not in passed]):
                raise SpecError(
                    f"model.options.timesteps: found {missed[0]}; the trajectory of {key_of(name)}.generate with steps = "
                    f"{sampling.steps} goes through {', '.join(map(str, passed[:10]))}{', ...' if len(passed) > 10 else ''}."
                )
        return found

    def _sized(self, example: Example) -> Example:
        return sized(example, self._num_copies(example))

    def _num_copies(self, example: Example) -> int:
        """In how many copies an example is seen, or in how many images of its trajectory."""
        if TIMES in example.inputs:
            return len(self._places(example.inputs[TIMES]))
        listed = self._options.timesteps
        return (listed if isinstance(listed, int) else len(listed)) * self._options.noises

    def _places(self, passed: np.ndarray) -> np.ndarray:
        """Where in a trajectory the timesteps are that model.options lists: everywhere unless it does."""
        listed = self._options.timesteps
        if isinstance(listed, int):
            return np.arange(len(passed))
        return np.array([passed.tolist().index(timestep) for timestep in listed])

    @cached_property
    def _argument(self) -> str | None:
        """The name of the argument in which the model takes classes."""
        saved, named = self._saved, self._options.class_argument
        if named is None and saved is not None and saved.conditional():
            return _CLASS_LABELS
        return named

    def _classes(self, labelled: Labelled) -> Classes | None:
        """The order of the classes, None where the model takes none."""
        if self._argument is None:
            return None
        return labelled.classes(declared=self._options.classes, learned=None)

    def _made(self, *, shape_only: bool, filled: bool) -> nn.Module:
        """The model in evaluation mode without dropout, with its weights if it is to be ``filled``."""
        from torch import nn

        saved, weights = self._saved, self.model.weights if filled and not shape_only else None
        if saved is None:
            # Made in full where its shape is asked for, too: a user's function may look at values, which meta has not.
            module = make_module(self.model.source, self._options.arguments or {})
        else:
            module = saved.load(shape_only=shape_only, filled=filled and weights is None)
        if weights is not None:
            fill(module, weights)
        if self.model.peft is not None and filled:
            module = wrap_in_lora(module, self.model.peft, "meta" if shape_only else "cpu")
        for part in module.modules():
            if isinstance(part, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.AlphaDropout):
                part.p = 0.0
        return module.eval()

    def _noised(self, model: nn.Module, examples: Sequence[Example]) -> tuple[Tensor, Tensor, np.ndarray]:
        r"""The noisy images [B, S, C, H, W] that examples are seen in, the noise in them, and their timesteps [S].

        They are :math:`x_s = \sqrt{\bar\alpha} x + \sqrt{1 - \bar\alpha} \epsilon_s`; of a trajectory the noise is the one
        that this makes of its last image.
        """
        import torch

        parameter = next(model.parameters())
        made = PATH in examples[0].inputs
        if parameter.is_meta:
            # Shapes alone, which tell how much is alive at once, and for which no schedule is asked of a hub.
            shape, copies = (
                examples[0].inputs[LAST if made else IMAGE].shape,
                self._counted(self._num_copies(examples[0])),
            )
            blank = parameter.new_zeros((len(examples), copies, *shape))
            return blank, blank, np.zeros(copies, np.int64)
        places = self._places(examples[0].inputs[TIMES]) if made else np.arange(len(self._copies))
        times = (examples[0].inputs[TIMES] if made else self._copies.times)[places]

        def stacked(name: str) -> Tensor:
            return torch.from_numpy(np.stack([example.inputs[name] for example in examples])).to(parameter)

        images = stacked(LAST) if made else stacked(IMAGE) / 127.5 - 1
        # In float64: of 1 less a level that is nearly 1, float32 leaves three digits.
        levels = self._schedule.levels[times].reshape(-1, 1, 1, 1)
        kept, added = (torch.from_numpy(np.sqrt(share)).to(parameter) for share in (levels, 1 - levels))
        if made:
            noisy = stacked(PATH)[:, places.tolist()]
            return noisy, (noisy - kept * images[:, None]) / added, times
        drawn = torch.from_numpy(self._copies.noise(tuple(images.shape[1:])).copy()).to(parameter)
        noise = drawn.expand(len(examples), *drawn.shape)
        return kept * images[:, None] + added * noise, noise, times

    def _counted(self, copies: int) -> int:
        """As many copies as take, all at once, the memory that the copies of a call and what is kept of the others take."""
        alive = min(copies, self._options.copies_per_call or copies)
        return alive + math.ceil(KEPT_SHARE * (copies - alive))

    def _predicted(self, model: nn.Module, noisy: Tensor, times: np.ndarray, classes: Sequence[int] | None) -> Tensor:
        """The predicted noise [B, S, C, H, W], some copies at a time.

        A call takes its copies example by example, which the extractor of gradients counts on. Of several calls none keeps
        its activations: each is made again when its gradient is asked for.
        """
        import torch
        from torch.utils.checkpoint import checkpoint

        a_call = self._options.copies_per_call or len(times)

        def call(part: Tensor, part_times: np.ndarray) -> Tensor:
            chosen = None if classes is None else np.repeat(classes, len(part_times))
            return self._call(model, part.flatten(0, 1), np.tile(part_times, len(part)), chosen).view(part.shape)

        found = []
        for first in range(0, len(times), a_call):
            part, part_times = noisy[:, first : first + a_call], times[first : first + a_call]
            if a_call < len(times) and torch.is_grad_enabled():
                found.append(checkpoint(call, part, part_times, use_reentrant=False, preserve_rng_state=False))
            else:
                found.append(call(part, part_times))
        return torch.cat(found, 1)

    def _call(self, model: nn.Module, noisy: Tensor, times: np.ndarray, classes: np.ndarray | None) -> Tensor:
        """The predicted noise of images [n, C, H, W] at timesteps [n], of classes [n]."""
        return predict_noise(
            model, self.model.source, noisy, times, {} if self._argument is None else {self._argument: classes}
        )

    def _refuse_what_the_model_cannot_take(self, found: Examples) -> None:
        """Run the model once, with whatever weights, on the image of the last class at the last timestep."""
        import torch

        every = [example for rows in found.splits.values() for example in rows]
        example = max(every, key=lambda item: int(item.inputs.get(CLASS, 0)))
        model = self._made(shape_only=False, filled=False)
        noisy = torch.zeros(1, *example.inputs[IMAGE].shape)
        classes = classes_of([example])
        with torch.no_grad():
            self._call(
                model, noisy, np.array([self._schedule.steps - 1]), None if classes is None else np.array(classes)
            )

    def _sampled(
        self, samplings: Mapping[str, Sampling], train: Sequence[Example], classes: Classes | None
    ) -> dict[str, list[Example]]:
        """The examples of the splits that the model makes, which it is loaded for once per device."""
        models: dict[str, nn.Module] = {}

        def predict(x: Tensor, timestep: int, chosen: Sequence[int] | None) -> Tensor:
            device = x.device.type
            if device not in models:
                models[device] = self.load(device)
            times = np.full(len(x), timestep, np.int64)
            return self._call(models[device], x, times, None if chosen is None else np.array(chosen))

        splits, ranges = self.data.splits(), self.data.ranges()
        made = {}
        for name, sampling in samplings.items():
            start, stop = ranges[name]
            assert stop is not None, "a split that is generated says how many rows it has"
            wanted = Wanted(name=name, section=splits[name], numbers=(start, stop), sampling=sampling)
            made[name] = sampled_split(predict, self._schedule.levels, wanted, train, classes)
        return made

    def _architecture(self) -> dict[str, Any]:
        """The function and its arguments, or a hash of what the configuration says about the computation."""
        saved = self._saved
        if saved is None:
            return {"source": self.model.source, "arguments": content_hash(self._options.arguments or {})}
        return {"config": saved.architecture()}
