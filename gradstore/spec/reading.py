"""From the text of run.toml to a RunSpec, and the errors for what it may not say."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from gradstore.errors import SpecError
from gradstore.spec.data import SPLITS, DataSection, SplitSection
from gradstore.spec.evaluation import LABEL
from gradstore.spec.sections import RunSpec
from gradstore.spec.urls import refuse_credentials

T = TypeVar("T", bound=BaseModel)
_METHOD: Final = "method:"
_METHODS: Final = Path(__file__).parent / "methods"
_MODEL_PATHS: Final = ("source", "weights", "peft")


def read_spec(path: str | Path) -> RunSpec:
    """Read and check run.toml; relative paths inside it are made absolute against its folder.

    ``include`` lists files that are read before it, beside it or, as ``method:NAME``, of those that come with gradstore: what
    later ones say, and at last run.toml itself, stands in place of what earlier ones say, key by key.

    Raises
    ------
    SpecError
        With one line per problem: the key, what was found, and what is accepted.
    """
    path = Path(path)
    return parse_spec(_with_included(path, ()), origin=str(path), folder=path.resolve().parent)


def _with_included(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file over those of the files that it includes."""
    values = _read_toml(path)
    names = values.pop("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"{path}: include: found {names!r}; accepted: a list of files and of method:NAME.")
    found: dict[str, Any] = {}
    for name in names:
        file = _method(name, path) if name.startswith(_METHOD) else path.parent / name
        if file.resolve() in (path.resolve(), *within):
            raise SpecError(f"{path}: include: {name} includes this file in turn.")
        found = _merged(found, _with_included(file, (path.resolve(), *within)))
    return _merged(found, values)


def _method(name: str, path: Path) -> Path:
    known = {file.stem: file for file in _METHODS.glob("*.toml")}
    if (method := name.removeprefix(_METHOD)) not in known:
        raise SpecError(f"{path}: include: found {name!r}; accepted methods: {', '.join(sorted(known))}.")
    return known[method]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables merged key by key; all else of the upper one."""
    both = {key: _merged(below[key], value) for key, value in above.items() if _are_tables(below.get(key), value)}
    return {**below, **above, **both}


def _are_tables(*values: Any) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SpecError(f"{path}: no such file. `gradstore init` writes one.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not readable as TOML: {error}.") from error


def parse_spec(values: Mapping[str, Any], *, origin: str = "run.toml", folder: Path | None = None) -> RunSpec:
    """Check the values of a run.toml; see `read_spec`."""
    try:
        refuse_credentials("", values)
        spec = RunSpec.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(f"{origin}: {explain(error, values, RunSpec)}") from error
    except SpecError as error:
        raise SpecError(f"{origin}: {error}") from error
    return spec if folder is None else _resolve_paths(spec, folder)


def _resolve_paths(spec: RunSpec, folder: Path) -> RunSpec:
    def absolute(value: str) -> str:
        # A hub id and a package: or s3:// source are no paths; only what exists beside run.toml or here is one. Workers run in
        # folders of their own, so they are told the whole path.
        places = [] if ":" in value else [folder / value, Path(value).absolute()]
        return next((str(place) for place in places if place.exists()), value)

    def resolved(section: T, *keys: str) -> T:
        given = {key: value for key in keys if (value := getattr(section, key)) is not None}
        return section.model_copy(update={key: absolute(value) for key, value in given.items()})

    model = resolved(spec.model, *_MODEL_PATHS)
    model = model.model_copy(update={"members": [resolved(member, *_MODEL_PATHS) for member in model.members]})
    if isinstance(attributed := model.options.get("attributed"), Mapping):
        paths = {key: absolute(attributed[key]) for key in _MODEL_PATHS if isinstance(attributed.get(key), str)}
        model = model.model_copy(update={"options": {**model.options, "attributed": {**attributed, **paths}}})
    if model.config is not None:
        model = model.model_copy(update={"config": str(folder / model.config)})
    training = resolved(spec.training, "base")
    data = spec.data
    splits = {name: resolved(data.splits()[name], "source", "labels") for name in SPLITS}
    aspects = {name: resolved(split, "source", "labels") for name, split in data.aspects.items()}

    def with_file(section: T, key: str) -> T:
        value = getattr(section, key)
        if value is None or "://" in value:
            return section
        # What is not there yet is looked for beside run.toml.
        found = absolute(value)
        return section.model_copy(update={key: str(folder / value) if found == value else found})

    evaluate = resolved(spec.evaluate, "encoder")
    if evaluate.recall is not None:
        recall = with_file(evaluate.recall, "pairs")
        evaluate = evaluate.model_copy(update={"recall": recall if recall.by == LABEL else with_file(recall, "by")})
    if evaluate.mislabel is not None:
        evaluate = evaluate.model_copy(update={"mislabel": with_file(evaluate.mislabel, "examples")})
    if evaluate.lds is not None and evaluate.lds.store is not None:
        lds = evaluate.lds.model_copy(update={"store": _whole(evaluate.lds.store)})
        evaluate = evaluate.model_copy(update={"lds": lds})
    return spec.model_copy(
        update={
            "run": spec.run.model_copy(update={"store": _whole(spec.run.store)}),
            "model": model,
            "data": data.model_copy(update={**splits, "aspects": aspects}),
            "learn": with_file(spec.learn, "pairs"),
            "training": training,
            "evaluate": evaluate,
        }
    )


def _whole(store: str) -> str:
    """A store's URL, or its whole path: workers run in folders of their own."""
    return store if "://" in store else str(Path(store).expanduser().absolute())


def explain(error: ValidationError, values: Any, model: type[BaseModel] | None, prefix: str = "") -> str:
    """One line for each value that pydantic refuses: the key, what was found, what is accepted.

    Parameters
    ----------
    error
        What it raised.
    values
        What it was given.
    model
        What they were to be, whose keys are told; None where they are not known.
    prefix
        What the keys are below.
    """
    lines: dict[str, str] = {}
    for problem in error.errors():
        path = _written(problem["loc"], values)
        key = ".".join([prefix, *path] if prefix else path)
        if problem["type"] == "extra_forbidden":
            accepted = ", ".join(_keys_beside(model, path)) if model else ""
            lines[key] = f"{key}: unknown key; accepted here: {accepted}"
        elif problem["type"] == "missing":
            lines[key] = f"{key}: is missing"
        else:
            message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            # Of a value that may be one of several things each is refused by itself.
            found = lines.get(key, f"{key}: found {problem['input']!r}; accepted")
            lines[key] = f"{found}{', or ' if key in lines else ': '}{message}"
    return "\n".join(f"{line}." for line in lines.values())


def _written(loc: Sequence[int | str], values: Any) -> list[str]:
    """The keys of a place as they are written: without the names of types among which pydantic chose."""
    path: list[str] = []
    for place, part in enumerate(loc):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            # A key that is missing is the last, and its table is there.
            if not (isinstance(values, Mapping) and place == len(loc) - 1):
                continue
        path.append(str(part))
    return path


def _keys_beside(model: type[BaseModel], path: list[str]) -> list[str]:
    current: type[BaseModel] = model
    parts = iter(path[:-1])
    for part in parts:
        field = current.model_fields.get(part)
        annotation = field.annotation if field else None
        if get_origin(annotation) is dict:
            # Of tables that the user names, such as aspects, the name comes next.
            annotation = get_args(annotation)[1] if next(parts, None) is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        current = annotation
    keys = list(current.model_fields)
    if current is DataSection:
        keys += [f"{key} (default of all splits)" for key in SplitSection.model_fields]
    return keys
