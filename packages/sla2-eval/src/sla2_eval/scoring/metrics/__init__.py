"""The registry of metrics. Importing it imports no torch, no metric library and no model; `load`
does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

from sla2_eval.runs.extras import how_to_get
from sla2_eval.scoring.metrics.base import MetricSpec, MetricUnavailable

_MODULES = (
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


def _module(name: str):
    return importlib.import_module(f"sla2_eval.scoring.metrics.{name}")


def specs() -> dict[str, MetricSpec]:
    """Every metric by name, in the order of the tables."""
    return {spec.name: spec for name in _MODULES for spec in _module(name).SPECS}


def select(names: Iterable[str]) -> dict[str, MetricSpec]:
    """The metrics called `names`, in the registry's order. Raises ValueError for an unknown or
    repeated one.
    """
    known, names = specs(), list(names)
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


def module_of(name: str):
    """The module that implements the metric `name`."""
    for module in _MODULES:
        if any(spec.name == name for spec in _module(module).SPECS):
            return _module(module)
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
    "select",
    "specs",
    "why_unavailable",
]
