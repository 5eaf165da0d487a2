"""The registry of metrics: those of this folder, of installed packages that have an entry point for
theirs, and of modules that are named. Importing it imports no torch, no metric library and no
model; `load` does.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable
from types import ModuleType

from sla2_eval.runs.extras import how_to_get
from sla2_eval.scoring.metrics.base import MetricSpec, MetricUnavailable

_HERE = "sla2_eval.scoring.metrics"
_MODULES = [
    f"{_HERE}.{name}"
    for name in (
        "psnr",
        "ssim",
        "lpips",
        "vmaf",
        "clip",
        "fvd",
        "jedi",
        "consistency",
        "temporal_flickering",
        "motion_smoothness",
        "dynamic_degree",
        "aesthetic_quality",
        "imaging_quality",
        "overall_consistency",
        "caption_accuracy",
    )
]


ENTRY_POINTS = "sla2_eval.metrics"  # their group; each names a module, as register takes one
# What a name may stand for beside a metric: all of a kind, all of VBench's, or all that there are,
# less those that know the built-in data set alone.
GROUPS: dict[str, Callable[[MetricSpec], bool]] = {
    "paired": lambda spec: spec.kind == "paired",
    "unpaired": lambda spec: spec.kind == "unpaired",
    "set": lambda spec: spec.kind == "set",
    "vbench": lambda spec: spec.vbench is not None,
    "all": lambda spec: True,
}
_looked = False  # whether the entry points were registered


def register(module: str) -> None:
    """Make the metrics of a module known in this process: one that has SPECS and load, as those of
    this folder. Workers of scoring register what their driver has registered.

    Raises ValueError for a module that cannot be imported or has no SPECS, and for a name that is
    taken.
    """
    if module in _MODULES:
        return
    try:
        found = importlib.import_module(module).SPECS
    except Exception as error:  # whatever a module of others does when it is imported
        what = error if str(error) else type(error).__name__
        raise ValueError(
            f"metrics: expected a module with SPECS, got {module!r}: {what}"
        ) from error
    known = specs()
    if taken := next((spec.name for spec in found if spec.name in known), None):
        raise ValueError(f"metrics: expected new names in {module}, got {taken!r}, which is known")
    _MODULES.append(module)


def _register_installed() -> None:
    """Register the modules of the entry points, once. One that cannot be is left out with a
    warning: a package that has nothing to do with a run must not end it.
    """
    global _looked
    if _looked:
        return
    _looked = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(point.value)
        except ValueError as error:
            package = point.dist.name if point.dist else "an unknown package"
            warnings.warn(f"{ENTRY_POINTS}: {point.name} of {package}: {error}", stacklevel=2)


def registered() -> tuple[str, ...]:
    """The modules outside this folder that are registered."""
    _register_installed()
    return tuple(module for module in _MODULES if not module.startswith(f"{_HERE}."))


def specs() -> dict[str, MetricSpec]:
    """Every metric by name, in the order of the tables."""
    _register_installed()
    return {spec.name: spec for m in _MODULES for spec in importlib.import_module(m).SPECS}


def select(names: Iterable[str], *, reference: bool = True) -> dict[str, MetricSpec]:
    """The metrics called `names`, in the registry's order; `module:name` registers the module
    first, and a name of GROUPS stands for all of the group: without a `reference` for those that
    need none.

    Raises ValueError for an unknown or repeated name, and for a group without any metric.
    """
    parts = [name.rpartition(":") for name in names]
    for module, _, name in parts:
        if module:
            register(module)
            if name not in {spec.name for spec in importlib.import_module(module).SPECS}:
                raise ValueError(f"metrics: expected a metric of {module}, got {name!r}")
    known, names = specs(), [name for _, _, name in parts]
    if not names:
        raise ValueError("metrics: expected at least one name, got none")
    chosen: set[str] = set()
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"metrics: expected each name once, got {name!r} {names.count(name)} times"
            )
        chosen |= _of_group(name, known, reference) if name in GROUPS else {name}
        if name not in GROUPS and name not in known:
            raise ValueError(
                f"metrics: expected names among {', '.join([*known, *GROUPS])}, got {name!r}"
                f"{_meant(name, [*known, *GROUPS])}"
            )
    return {name: spec for name, spec in known.items() if name in chosen}


def _of_group(group: str, known: dict[str, MetricSpec], reference: bool) -> set[str]:
    found = {
        name
        for name, spec in known.items()
        if GROUPS[group](spec) and not spec.tiny_only and (reference or spec.kind == "unpaired")
    }
    if not found:
        raise ValueError(f"reference: expected a folder for the metrics {group!r}, got none")
    return found


def _meant(name: str, known: Iterable[str]) -> str:
    """A question after the name that is most like a wrong one, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_settings(settings: dict[str, dict], chosen: dict[str, MetricSpec]) -> None:
    """Raise ValueError, in one line, for settings of a metric that is not among the `chosen`, that
    it does not have, or of another kind than its default.
    """
    for name, given in settings.items():
        if name not in chosen:
            known = ", ".join(chosen)
            raise ValueError(
                f"settings: expected names among {known}, got {name!r}{_meant(name, chosen)}"
            )
        for key, value in given.items():
            _check_setting(chosen[name], key, value)


def _check_setting(spec: MetricSpec, key: str, value: object) -> None:
    if key in ("files", "digests"):
        given = list(value) if isinstance(value, dict) else [value]
        if wrong := next((name for name in given if name not in spec.weights), None):
            known = ", ".join(spec.weights) or "none"
            raise ValueError(
                f"settings: expected weights among {known} in {key} of {spec.name}, got {wrong!r}"
            )
        texts = value.values() if isinstance(value, dict) else [value]
        if wrong := [text for text in texts if not isinstance(text, str | os.PathLike)]:
            raise ValueError(f"settings: expected texts in {key} of {spec.name}, got {wrong[0]!r}")
        return
    if key not in spec.settings:
        names = [*spec.settings, "files"]
        raise ValueError(
            f"settings: expected {', '.join(names)} or digests for {spec.name}, got {key!r}"
            f"{_meant(key, names)}"
        )
    if choices := spec.choices.get(key):
        if value not in choices:
            raise ValueError(
                f"settings: expected {key} of {spec.name} to be"
                f" {' or '.join(map(repr, choices))}, got {value!r}"
            )
    elif not _is_like(value, spec.settings[key]):
        raise ValueError(
            f"settings: expected {key} of {spec.name} to be like {spec.settings[key]!r}, got"
            f" {value!r}"
        )


def _is_like(value: object, default: object) -> bool:
    """Whether a value is of the kind of a default. Models have names, or their configuration."""
    if isinstance(default, bool) or isinstance(value, bool):
        return type(value) is type(default)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, str | dict):
        return isinstance(value, str | dict)
    return isinstance(value, list | tuple if isinstance(default, list) else type(default))


def why_unavailable(spec: MetricSpec, settings: dict | None = None) -> str | None:
    """One line that says what the metric lacks here and how to get it, or None if it can run."""
    from sla2_eval.scoring import weights

    for package in spec.packages:
        name, _, about = package.partition(" ")
        if importlib.util.find_spec(name) is None:
            about = about or f"({how_to_get(name)})"
            return f"unavailable: needs the Python package {name} {about}"
    lacks: Callable[[], str | None] = getattr(module_of(spec.name), "lacks", lambda: None)
    if reason := lacks():
        return f"unavailable: {reason}"
    missing = [
        name
        for name in spec.weights
        if not weights.is_present(name, (settings or {}).get("files", {}))
    ]
    if missing:
        return "unavailable: run " + " && ".join(weights.how_to_get(name) for name in missing)
    return None


def module_of(name: str) -> ModuleType:
    """The module that implements the metric `name`."""
    for module in _MODULES:
        found = importlib.import_module(module)
        if any(spec.name == name for spec in found.SPECS):
            return found
    raise ValueError(f"metrics: expected names among {', '.join(specs())}, got {name!r}")


def load(name: str, settings: dict, device: str = "cpu") -> Callable:
    """The scorer of the metric `name`, its model loaded. Raises MetricUnavailable if its weights or
    packages are missing.
    """
    module = module_of(name)
    spec = specs()[name]
    if reason := why_unavailable(spec, settings):
        raise MetricUnavailable(reason)
    return module.load(name, {**spec.settings, **settings}, device)


__all__ = [
    "MetricSpec",
    "MetricUnavailable",
    "load",
    "module_of",
    "register",
    "registered",
    "select",
    "specs",
    "why_unavailable",
]
