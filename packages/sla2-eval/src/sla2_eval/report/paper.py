"""The paper's own points, to be shown beside those of a run that they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any

# Our name of each of its metrics, and what ours is multiplied by there.
METRICS = {
    "IQ": ("imaging_quality", 100),
    "OC": ("overall_consistency", 100),
    "AQ": ("aesthetic_quality", 100),
    "MS": ("motion_smoothness", 100),
    "SC": ("subject_consistency", 100),
    "VR": ("vision_reward", 1),
}
MODELS = {"wan2.1-1.3b-480p": "Wan2.1 1.3B, 480p", "wan2.1-14b-720p": "Wan2.1 14B, 720p"}
_SIZES = {"wan2.1-1.3b-480p": "1.3b", "wan2.1-14b-720p": "14b"}  # in the names of such models
FAMILIES = {
    "sla2": "SLA2",
    "sla": "SLA",
    "vsa": "VSA",
    "vmoba": "VMoBA",
    "sla2-no-qat": "SLA2 without QAT",
    "sla2-topk-router": "SLA2, heuristic router",
}


def paper() -> dict:
    """The paper's points by model, metric (in our names and on our scale) and family: [{"sparsity",
    "value"}], and full attention's value.
    """
    tables = json.loads((files("sla2_eval.report") / "templates" / "paper_tables.json").read_text())
    columns = tables["columns"]
    models = {}
    for model, title in MODELS.items():
        by_metric = {}
        for code, (name, scale) in METRICS.items():
            column = columns.index(code)
            families = {
                FAMILIES[family]: [
                    {
                        "sparsity": row[columns.index("sparsity")],
                        "value": round(row[column] / scale, 6),
                    }
                    for row in points.values()
                ]
                for family in FAMILIES
                if (points := tables[model].get(family))
            }
            full = round(tables[model]["full"]["0"][column] / scale, 6)
            by_metric[name] = {"full": full, "families": families}
        models[model] = {"title": title, "metrics": by_metric}
    return {"source": tables["source"], "models": models}


def belonging(runs: Iterable[dict]) -> list[str]:
    """The paper's models that these runs may stand beside: of the same size, by the name of the
    runs' model; all where no run says what its model is.
    """
    names = [name.lower() for run in runs for name in _names(run["settings"])]
    if not names:
        return list(MODELS)
    return [m for m in MODELS if any("wan2.1" in n and _SIZES[m] in n for n in names)]


def _names(settings: Any) -> Iterator[str]:
    """The hub ids and folders of models in the settings of a run."""
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if key == "model" and isinstance(value, str):
            yield value
        elif key == "model" and isinstance(value, dict):
            yield from (value["id"],) if "id" in value else ()
        else:
            yield from _names(value)
