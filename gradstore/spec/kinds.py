"""Kinds and their options, and plain values compared and hashed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from gradstore.errors import SpecError
from gradstore.spec.reading import explain

T = TypeVar("T")


def resolve_kind(kinds: Mapping[str, type[T]], kind: str, options: Mapping[str, Any], key: str) -> T:
    """Make the dataclass that ``kinds`` holds under ``kind`` from its options, with their names and types checked.

    Raises
    ------
    SpecError
        If the kind is unknown, or an option is unknown, missing or of the wrong type.
    """
    if kind not in kinds:
        raise SpecError(f"{key}.kind: found {kind!r}; accepted: {', '.join(sorted(kinds))}.")
    cls = kinds[kind]
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            accepted = f"accepted for {kind}: {', '.join(fields)}" if fields else f"{kind} takes no options"
            raise SpecError(f"{key}.{option}: unknown key; {accepted}.")
    definitions: dict[str, Any] = {
        name: (hints[name], ... if field.default is dataclasses.MISSING else field.default)
        for name, field in fields.items()
    }
    checker = create_model(cls.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **definitions)
    try:
        checked = checker.model_validate(dict(options))
    except ValidationError as error:
        raise SpecError(explain(error, options, None, key)) from error
    return cls(**{name: getattr(checked, name) for name in fields})


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, ours, theirs) of every leaf in which two nested mappings differ; None stands for an absent key."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*ours, *theirs}):
        left, right, name = ours.get(key), theirs.get(key), f"{prefix}{key}"
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{name}.")
        elif left != right:
            found.append((name, left, right))
    return found


def content_hash(value: Any) -> str:
    """Hex digest of a JSON-like value, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
