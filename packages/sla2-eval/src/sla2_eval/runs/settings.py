"""Settings files in YAML, read into the dataclasses of the parts they are for: an unknown key or a
wrong value is one line that names the file and the key.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    model_validator,
)

# Of a whole file; pydantic hands it on to the dataclasses of its sections.
_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_NO_MAPPING = ("dataclass_type", "model_type", "dict_type")


class SettingsError(ValueError):
    """Settings that cannot be used; the message is one line that names the file and the key."""


class Settings(BaseModel):
    """A settings file, or a section that no dataclass describes yet: unknown keys are errors."""

    model_config = _STRICT

    _given: frozenset[str] = PrivateAttr(frozenset())

    @model_validator(mode="wrap")
    @classmethod
    def _note_given(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(values)
        if isinstance(values, Mapping):
            sections = {name: v for name, v in values.items() if isinstance(v, Mapping)}
            inside = {f"{name}.{key}" for name, v in sections.items() for key in v}
            made._given = frozenset({str(name) for name in values} | inside)
        return made

    def is_given(self, key: str) -> bool:
        """Whether "key" or "section.key" was set, and is not a default."""
        return key in self._given


Kind = TypeVar("Kind")


def import_modules(names: Iterable[str]) -> None:
    """Import modules that register members, variants or families of their own.

    Raises SettingsError naming the module and what is wrong with it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module does as it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingsError(
                f"imports: expected modules that can be imported, got {name!r} ({reason})"
            ) from None


def _fields(kind: Any) -> dict[str, Any]:
    """{key: type} of a section."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return {field.name: None for field in dataclasses.fields(kind)}


def _known_keys(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that holds the last part of `location`."""
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        annotation = _fields(kind)[part]
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(
            c
            for c in candidates
            if isinstance(c, type) and (issubclass(c, BaseModel) or dataclasses.is_dataclass(c))
        )
    return list(_fields(kind))


def validate(values: object, kind: type[Kind], where: str) -> Kind:
    """`values` as `kind`, a dataclass or a Settings; modules under `imports` are imported first.

    Raises SettingsError, one line beginning with `where`, for the first thing that is wrong.
    """
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: expected keys and values, got {type(values).__name__}")
    modules = values.get("imports")
    if "imports" in _fields(kind) and isinstance(modules, list | tuple):
        try:
            import_modules(str(name) for name in modules)
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from None
    try:
        # pydantic takes no configuration for a dataclass itself, only for what holds it.
        wrapped: Any = tuple[kind]  # type: ignore[valid-type]
        return TypeAdapter(wrapped, config=_STRICT).validate_python((values,))[0]
    except ValidationError as error:
        raise SettingsError(f"{where}: {_explained(error, kind)}") from None


def _explained(error: ValidationError, kind: Any) -> str:
    """The first thing that is wrong, unknown keys before others: its key, what was expected, what
    came.
    """
    errors = error.errors()
    first = next((e for e in errors if e["type"] in _UNKNOWN), errors[0])
    location = first["loc"][1:]  # without the tuple around `kind`
    key = ".".join(str(part) for part in location)
    prefix = f"{key}: " if key else ""
    if first["type"] in _UNKNOWN:
        return f"{prefix}unknown key; known keys here: {', '.join(_known_keys(kind, location))}"
    if first["type"].startswith("missing"):
        return f"{prefix}expected a value, got none"
    if first["type"] in _NO_MAPPING:
        return f"{prefix}expected keys and values, got {type(first['input']).__name__}"
    if first["type"] == "value_error":  # of a check of ours, which names the field if it is of one
        message = str(first["ctx"]["error"])
        own = key and re.match(r"[a-z_0-9.]+: ", message)
        return f"{key}.{message}" if own else prefix + message
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{prefix}{message}, got {str(first['input'])[:80]!r}"


def load_settings(path: str | Path, kind: type[Kind]) -> Kind:
    """Read a YAML file as `kind`; relative paths in it are resolved against its folder.

    Raises SettingsError naming the file, and the line or key, if it is missing, not YAML, or holds
    unknown or wrong values.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: expected a YAML file, got nothing there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: expected a YAML file, got {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise SettingsError(f"{path}{line}: expected YAML, got: {problem}") from None
    settings = validate({} if values is None else values, kind, str(path))
    return _resolve_paths(settings, path.parent)


def _resolve_paths(settings: Any, folder: Path) -> Any:
    """The same settings with each relative path taken from `folder`."""
    changed: dict[str, object] = {}
    for name in _fields(type(settings)):
        value = getattr(settings, name)
        if isinstance(value, Path) and not value.is_absolute():
            changed[name] = folder / value
        elif isinstance(value, Settings) or dataclasses.is_dataclass(value):
            changed[name] = _resolve_paths(value, folder)
        elif isinstance(value, tuple) and any(isinstance(item, Settings) for item in value):
            changed[name] = tuple(_resolve_paths(item, folder) for item in value)
    if isinstance(settings, BaseModel):
        return settings.model_copy(update=changed)
    return dataclasses.replace(settings, **changed)
