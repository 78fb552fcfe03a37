"""LoRA adapters of PEFT on top of a model: the parameters whose gradients are taken are their factors A and B."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.models.pretrained import explained, find_source, refuse_unfilled
from gradstore.errors import SpecError
from gradstore.spec import content_hash

if TYPE_CHECKING:
    from torch import nn

_HOLDS: Final = "an adapter_config.json and adapter weights"

# Where an adapter came from and how it is trained; neither changes what it computes once its weights are there.
_NO_ARCHITECTURE: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "init_lora_weights",
        "lora_dropout",
        "peft_version",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# With these the factors are not applied as layers to the activations, or the gradient is not that of the loss.
_REFUSED: Final = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)


def wrap_in_lora(model: nn.Module, adapter: str, device: str) -> nn.Module:
    """Return the model with an adapter on it: the adapter's factors are trainable, all else is frozen.

    Names are those of `peft.PeftModel.from_pretrained`; on ``meta`` the adapter has its shapes, and no weights are read.

    Raises
    ------
    SpecError
        If peft is not installed, the adapter cannot be found, does not fit the model, or is no plain LoRA.
    DataError
        If its weights are damaged or do not fill it.
    """
    config = _config(adapter)
    import torch
    from peft import get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    with _explained(adapter):
        if device == "meta":
            # Some of PEFT's ways to begin decompose the weights, which are not there.
            config.init_lora_weights = False
            with torch.device("meta"):
                return get_peft_model(model, config)  # type: ignore[no-any-return]
        wrapped = get_peft_model(model, config)
        weights = load_peft_weights(_source(adapter), device="cpu")
        report: Any = set_peft_model_state_dict(wrapped, weights, ignore_mismatched_sizes=False)
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    missing = sorted(trainable.intersection(report.missing_keys))
    refuse_unfilled("model.peft", adapter, missing, [], "a LoRA adapter of this model")
    return wrapped  # type: ignore[no-any-return]


def lora_identity(adapter: str) -> str:
    """Return the hash of what an adapter's configuration says about the computation: its scale, ranks and targets."""
    config = _config(adapter)
    # What is as PEFT has it by default is left out: every version of it has more keys.
    defaults = type(config)().to_dict()
    values = {name: value for name, value in config.to_dict().items() if value != defaults.get(name)}
    return content_hash(_plain({name: value for name, value in values.items() if name not in _NO_ARCHITECTURE}))


def _config(adapter: str) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise SpecError(f"model.peft: {adapter!r} needs: pip install 'gradstore[peft]'.") from error
    with _explained(adapter):
        config = PeftConfig.from_pretrained(_source(adapter))
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        used = [f"{name} = {getattr(config, name)!r}" for name in _REFUSED if getattr(config, name, None)]
        if kind != "LORA" or used:
            raise SpecError(
                f"model.peft: {adapter!r} is {kind}{' with ' if used else ''}{', '.join(used)}; accepted: plain LoRA, "
                "whose factors are layers of the model. Merge the adapter into its model and name that as model.source."
            )
    config.inference_mode = False
    # Otherwise PEFT tells that the model is now elsewhere than when the adapter was trained.
    config.base_model_name_or_path = None
    return config


def _source(adapter: str) -> str:
    return find_source(adapter, "model.peft", _HOLDS)


@contextmanager
def _explained(adapter: str) -> Iterator[None]:
    with (
        explained(f"model.peft: {adapter!r}", role="a LoRA adapter of this model", holds=_HOLDS),
        warnings.catch_warnings(),
    ):
        # PEFT asks transformers by names that are to go; whoever runs gradstore cannot change that.
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _plain(value: Any) -> Any:
    """As JSON holds it: sets sorted, enumerations by their values."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
