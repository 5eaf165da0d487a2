"""The paper's own points, to be shown beside a run's."""

from __future__ import annotations

import json
from importlib.resources import files

PAPER_METRICS = {
    "IQ": "Imaging quality",
    "OC": "Overall consistency",
    "AQ": "Aesthetic quality",
    "MS": "Motion smoothness",
    "SC": "Subject consistency",
    "VR": "VisionReward",
}
PAPER_MODELS = {"wan2.1-1.3b-480p": "Wan2.1 1.3B, 480p", "wan2.1-14b-720p": "Wan2.1 14B, 720p"}
PAPER_FAMILIES = {
    "sla2": "SLA2",
    "sla": "SLA",
    "vsa": "VSA",
    "vmoba": "VMoBA",
    "sla2-no-qat": "SLA2 without QAT",
    "sla2-topk-router": "SLA2, heuristic router",
}


def paper() -> dict:
    """The paper's own points by model, metric and family: [{"sparsity", "value"}], and full
    attention's value.
    """
    tables = json.loads((files("sla2_eval.report") / "templates" / "paper_tables.json").read_text())
    columns = tables["columns"]
    models = {}
    for model, title in PAPER_MODELS.items():
        by_metric = {}
        for code, name in PAPER_METRICS.items():
            column = columns.index(code)
            families = {
                PAPER_FAMILIES[family]: [
                    {"sparsity": row[columns.index("sparsity")], "value": row[column]}
                    for row in points.values()
                ]
                for family in PAPER_FAMILIES
                if (points := tables[model].get(family))
            }
            by_metric[code] = {
                "title": name,
                "full": tables[model]["full"]["0"][column],
                "families": families,
            }
        models[model] = {"title": title, "metrics": by_metric}
    return {"source": tables["source"], "models": models}
