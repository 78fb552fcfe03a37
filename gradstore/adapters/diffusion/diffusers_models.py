"""UNets of the library `diffusers`, with the noise schedule that is saved beside them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.diffusion.schedule import Schedule
from gradstore.adapters.models.pretrained import explained, find_source, refuse_unfilled
from gradstore.errors import SpecError
from gradstore.spec import content_hash

if TYPE_CHECKING:
    from torch import nn

_HOLDS: Final = "a DDPMPipeline or a UNet2DModel"
_ROLE: Final = "a diffusion model"
_UNET: Final = "UNet2DModel"
# Where it came from, and by what release it was saved.
_NO_ARCHITECTURE: Final = ("_name_or_path", "_diffusers_version", "_use_default_values")
# What a scheduler says of its betas.
_SCHEDULE: Final = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedUnet:
    """A pipeline's folder or hub id, whose UNet is in ``unet`` and whose schedule in ``scheduler``, or both at its top.

    Attributes
    ----------
    source
        The folder or hub id, as run.toml names it.
    revision
        Of the hub; None for its main branch.
    config
        A file with the UNet's configuration, which is read in the place of the saved one: for plans of models that are far away.
    """

    source: str
    revision: str | None
    config: str | None = None

    def load(self, *, shape_only: bool, filled: bool = True) -> nn.Module:
        """Return the UNet in float32: on ``meta`` where only its shape is asked for, and without weights unless filled.

        Raises
        ------
        SpecError
            If diffusers is not installed, or the folder or id holds no UNet2DModel.
        DataError
            If its weights are damaged or do not fill it. They are read as safetensors only.
        """
        import torch

        config, where = self._config()
        from diffusers import UNet2DModel

        with self._explained():
            if shape_only or not filled:
                with torch.device("meta" if shape_only else "cpu"):
                    made: nn.Module = UNet2DModel.from_config(config)
                return made
            module, report = UNet2DModel.from_pretrained(
                self._found(),
                **where,
                **self._revision(),
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,
                output_loading_info=True,
                # A pickle may run code; what has another shape is refused below, by name.
                use_safetensors=True,
                ignore_mismatched_sizes=True,
            )
        mismatched = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
        refuse_unfilled("model.source", self.source, [*report["missing_keys"]], mismatched, _ROLE)
        loaded: nn.Module = module
        return loaded

    def schedule(self) -> Schedule | None:
        """Return the saved schedule, or None where there is none.

        Raises
        ------
        SpecError
            If its model predicts anything but the noise.
        """
        config = self._scheduler_config()
        if config is None:
            return None
        from diffusers import DDPMScheduler

        with self._explained():
            scheduler = DDPMScheduler.from_config(config)
        if (predicts := scheduler.config.prediction_type) != "epsilon":
            raise SpecError(
                f"model.source: {self.source} predicts {predicts!r} (prediction_type of its scheduler); accepted: "
                "'epsilon', the noise, whose functions the methods differentiate."
            )
        return Schedule(
            levels=scheduler.alphas_cumprod.double().numpy(),
            facts={name: getattr(scheduler.config, name) for name in _SCHEDULE},
        )

    def _scheduler_config(self) -> dict[str, Any] | None:
        from diffusers import DDPMScheduler

        for where in ({"subfolder": "scheduler"}, {}):
            try:
                return dict(DDPMScheduler.load_config(self._found(), **where, **self._revision()))
            except OSError:
                continue
        return None

    def conditional(self) -> bool:
        """Return whether the UNet takes classes."""
        config, _ = self._config()
        return any(config.get(name) is not None for name in ("num_class_embeds", "class_embed_type"))

    def architecture(self) -> str:
        """Return the hash of what the configuration says about the computation."""
        config, _ = self._config()
        return content_hash({key: value for key, value in config.items() if key not in _NO_ARCHITECTURE})

    def _config(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The UNet's configuration, and where in the folder it is."""
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise SpecError(
                f"model.source: {self.source!r} is no function (package.module:function); a model of diffusers needs: "
                "pip install 'gradstore[diffusion]'."
            ) from error
        where = {"subfolder": "unet"}
        with self._explained():
            if self.config is not None:
                return UNet2DModel.load_config(self.config), where
            source = self._found()
            try:
                config = UNet2DModel.load_config(source, **where, **self._revision())
            except OSError:
                where = {}
                config = UNet2DModel.load_config(source, **self._revision())
        if (kind := config.get("_class_name")) != _UNET:
            raise SpecError(
                f"model.source: {self.source} holds a {kind}; accepted: a {_UNET}, which works on pixels and takes a class or "
                "nothing. Any other diffusion model can be named as a function that makes it (package.module:function)."
            )
        return dict(config), where

    def _found(self) -> str:
        return find_source(self.source, "model.source", _HOLDS)

    def _revision(self) -> dict[str, str]:
        return {"revision": self.revision or "main"}

    def _explained(self) -> AbstractContextManager[None]:
        holds = f"{_HOLDS}, a function (package.module:function)"
        return explained(f"model.source: {self.source!r}", role=_ROLE, holds=holds)
