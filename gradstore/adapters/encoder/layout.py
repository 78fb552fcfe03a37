"""What lies around an encoder in a folder of sentence-transformers: how its states become one vector."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.errors import DataError, SpecError

if TYPE_CHECKING:
    from torch import nn

    from gradstore.numerics.representation.model import Pooling, Reading

MODULES: Final = "modules.json"
_LENGTH: Final = "sentence_bert_config.json"
_CONFIG: Final = "config.json"
_WEIGHTS: Final = "model.safetensors"
_POOLING_FOLDER: Final = "1_Pooling"
_DENSE_FOLDER: Final = "2_Dense"
_NORMALIZE_FOLDER: Final = "3_Normalize"
_KEY: Final = "model.source"
_IDENTITY: Final = "torch.nn.modules.linear.Identity"
# Keys of old and new versions that say how states are pooled.
_POOLINGS: Final[Mapping[str, Pooling]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "cls": "first",
    "lasttoken": "last",
}
_POOLING_KEYS: Final[Mapping[Pooling, str]] = {
    "mean": "pooling_mode_mean_tokens",
    "first": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the hidden states of an encoder become a representation.

    Attributes
    ----------
    pooling
        How states of tokens become one.
    dense
        The folder of a linear layer on it, and its (inputs, outputs), or None.
    normalize
        Whether it is divided by its norm.
    longest
        Most tokens that it is meant to read, or None where nothing is said.
    """

    pooling: Pooling = "mean"
    dense: tuple[str, int, int] | None = None
    normalize: bool = False
    longest: int | None = None

    @classmethod
    def read(cls, source: str, revision: str) -> Layout:
        """Read that of a folder or hub id; where there is none, the mean of the last states.

        Raises
        ------
        SpecError
            If it has modules that are not known.
        DataError
            If a file of it is damaged.
        """
        modules: Any = _json(source, MODULES, revision)
        if modules is None:
            return cls()
        found: dict[str, Any] = {}
        for module in modules:
            kind, folder = str(module["type"]).rpartition(".")[2], str(module["path"])
            if kind == "Transformer" and not folder:
                length: Any = _json(source, _LENGTH, revision) or {}
                found["longest"] = length.get("max_seq_length")
            elif kind == "Pooling" and "normalize" not in found:
                found["pooling"] = _pooling(source, _json(source, f"{folder}/{_CONFIG}", revision))
            elif kind == "Dense" and not {"dense", "normalize"} & found.keys():
                found["dense"] = _dense(source, folder, _json(source, f"{folder}/{_CONFIG}", revision))
            elif kind == "Normalize":
                found["normalize"] = True
            else:
                raise SpecError(
                    f"{_KEY}: {MODULES} of {source} has a module {kind} at {folder or '.'!r}; accepted: Transformer, Pooling, "
                    "one Dense and Normalize, in this order, the first beside the file."
                )
        return cls(**found)

    def open_dense(self, source: str, revision: str, *, shape_only: bool) -> nn.Linear | None:
        """Return the linear layer, or one of its shape; None where there is none.

        Raises
        ------
        DataError
            If its weights are damaged or of another shape.
        """
        from torch import nn

        if self.dense is None:
            return None
        folder, inputs, outputs = self.dense
        layer = nn.Linear(inputs, outputs, bias=False, device="meta" if shape_only else "cpu")
        if not shape_only:
            layer.load_state_dict(
                {"weight": _dense_weights(source, f"{folder}/{_WEIGHTS}", revision, (outputs, inputs))}
            )
        return layer


def write_layout(folder: Path, reading: Reading, *, width: int, dense: nn.Linear | None) -> None:
    """Write modules.json and what it names beside an encoder: how its states are pooled, and a linear layer on that."""
    from safetensors.torch import save

    found = {"Transformer": "", "Pooling": _POOLING_FOLDER}
    if dense is not None:
        found["Dense"] = _DENSE_FOLDER
    if reading.normalize:
        found["Normalize"] = _NORMALIZE_FOLDER
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(found.items())
    ]
    _write(folder / MODULES, modules)
    _write(folder / _LENGTH, {"max_seq_length": reading.context, "do_lower_case": False})
    _write(
        folder / _POOLING_FOLDER / _CONFIG, {"word_embedding_dimension": width, _POOLING_KEYS[reading.pooling]: True}
    )
    if dense is not None:
        shape = {"in_features": dense.in_features, "out_features": dense.out_features}
        _write(folder / _DENSE_FOLDER / _CONFIG, {**shape, "bias": False, "activation_function": _IDENTITY})
        (folder / _DENSE_FOLDER / _WEIGHTS).write_bytes(
            save({"linear.weight": dense.weight.detach().cpu().contiguous()})
        )


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _pooling(source: str, config: Any) -> Pooling:
    config = config or {}
    named = config.get("pooling_mode")
    chosen = (
        [named]
        if isinstance(named, str)
        else [key for key, value in config.items() if value is True and "pooling" in key]
    )
    if len(chosen) != 1 or chosen[0] not in _POOLINGS:
        raise SpecError(
            f"{_KEY}: {source} pools by {' and '.join(chosen) or 'nothing'}; accepted: the mean of its tokens, the first, or the "
            "last. Set model.options.pooling for an encoder without modules.json."
        )
    return _POOLINGS[chosen[0]]


def _dense(source: str, folder: str, config: Any) -> tuple[str, int, int]:
    config = config or {}
    if config.get("bias", True) or not str(config.get("activation_function", "")).endswith("Identity"):
        raise SpecError(
            f"{_KEY}: {folder} of {source} is not linear: bias = {config.get('bias', True)}, activation_function = "
            f"{config.get('activation_function')!r}; accepted: false, and {_IDENTITY}."
        )
    return folder, int(config["in_features"]), int(config["out_features"])


def _dense_weights(source: str, name: str, revision: str, shape: tuple[int, int]) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _file(source, name, revision)
    if file is None:
        raise DataError(f"{_KEY}: {source} has no {name}, which its {MODULES} names. Copy it again.")
    try:
        weight = load_file(file).get("linear.weight")
    except SafetensorError as error:
        raise DataError(
            f"{_KEY}: {name} of {source} holds damaged weights: {error}. Fetch or copy it again."
        ) from error
    if weight is None or tuple(weight.shape) != shape:
        found = "no linear.weight" if weight is None else f"linear.weight {list(weight.shape)}"
        raise DataError(f"{_KEY}: {name} of {source} has {found}, where its {_CONFIG} says {list(shape)}.")
    return weight


def _json(source: str, name: str, revision: str) -> Any:
    """A JSON file of a folder or hub id; None where there is none."""
    file = _file(source, name, revision)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{_KEY}: {name} of {source} is no JSON: {error}. Fetch or copy it again.") from error


def _file(source: str, name: str, revision: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
