"""The registry of metrics. Importing it imports no torch, no metric library and no model; `load`
does.
"""

from __future__ import annotations

import importlib
import importlib.util
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
        "clip",
        "fvd",
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
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"metrics: expected a module with SPECS, got {module!r}: {error}"
        ) from None
    known = specs()
    if taken := next((spec.name for spec in found if spec.name in known), None):
        raise ValueError(f"metrics: expected new names in {module}, got {taken!r}, which is known")
    _MODULES.append(module)


def registered() -> tuple[str, ...]:
    """The modules outside this folder that are registered."""
    return tuple(module for module in _MODULES if not module.startswith(f"{_HERE}."))


def specs() -> dict[str, MetricSpec]:
    """Every metric by name, in the order of the tables."""
    return {spec.name: spec for m in _MODULES for spec in importlib.import_module(m).SPECS}


def select(names: Iterable[str]) -> dict[str, MetricSpec]:
    """The metrics called `names`, in the registry's order; `module:name` registers the module
    first. Raises ValueError for an unknown or repeated one.
    """
    parts = [name.rpartition(":") for name in names]
    for module, _, _ in parts:
        if module:
            register(module)
    known, names = specs(), [name for _, _, name in parts]
    if not names:
        raise ValueError("metrics: expected at least one name, got none")
    for name in names:
        if name not in known:
            raise ValueError(f"metrics: expected names among {', '.join(known)}, got {name!r}")
        if names.count(name) > 1:
            raise ValueError(
                f"metrics: expected each name once, got {name!r} {names.count(name)} times"
            )
    return {name: spec for name, spec in known.items() if name in names}


def why_unavailable(spec: MetricSpec, settings: dict | None = None) -> str | None:
    """One line that says what the metric lacks here and how to get it, or None if it can run."""
    from sla2_eval.scoring import weights

    for package in spec.packages:
        name, _, about = package.partition(" ")
        if importlib.util.find_spec(name) is None:
            about = about or f"({how_to_get(name)})"
            return f"unavailable: needs the Python package {name} {about}"
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
