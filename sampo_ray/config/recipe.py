"""Reads a configuration: a YAML recipe plus dotted overrides, with one line for each mistake."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sampo_ray.config.base import suggestion
from sampo_ray.config.run import RunConfig
from sampo_ray.errors import ConfigError

Tree: TypeAlias = dict[str, object]


def load_config(recipe: str | Path | Mapping[str, object], overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML recipe (or takes a mapping), applies `a.b.c=value` overrides (values are YAML), validates.

    Raises ConfigError with one line per mistake.
    """
    tree = dict(recipe) if isinstance(recipe, Mapping) else _read_yaml(Path(recipe))
    for override in overrides:
        tree = _set(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e) for e in error.errors())) from None


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read ({error.strerror}); name an existing YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path}: holds {type(tree).__name__}, not sections such as `model:` and `data:`")
    return tree


def _set(tree: Tree, override: str) -> Tree:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.field=value")
    try:
        leaf = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    tree = copy.deepcopy(tree)
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        below = inner.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {section} is a value ({below!r}), not a section")
        inner = below
    inner[name] = leaf
    return tree


def _explain(error: ErrorDetails) -> str:
    path = [str(part) for part in error["loc"]]
    where, value = ".".join(path), error.get("input")
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key; {suggestion(path[-1], _fields_at(path[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: missing; set it in the recipe or as {where}=..."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}.{message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]} (got {value!r})"


def _fields_at(path: list[str]) -> list[str]:
    """The fields of the section at `path`, which may be optional."""
    section: type[BaseModel] = RunConfig
    for name in path:
        kind = section.model_fields[name].annotation
        section = next(t for t in (kind, *get_args(kind)) if isinstance(t, type) and issubclass(t, BaseModel))
    return list(section.model_fields)
