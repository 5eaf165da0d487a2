"""Puts adapters of a finished grid beside the weights of the tiny model that they belong to.

    python experiments/tiny_wan/ship.py experiments/tiny_wan/adapters.yaml runs/adapters \\
        f3b8f82 sla2-97

writes packages/sla2-eval/src/sla2_eval/tiny/weights/MODEL/adapters/VARIANT/ for each variant named:
the model's weights in bf16, router and mixing in fp32, and training.json, which says what was run,
by the code of which commit, and how the loss went.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sla2_core.adapter import load_adapter, save_adapter, write_json
from sla2_eval.grid.ablation import cells
from sla2_eval.grid.settings import AblationSettings
from sla2_eval.grid.source import open_source, with_shift
from sla2_eval.runs.settings import load_settings
from sla2_eval.tiny.model import weights_of

EVERY = 50  # steps that one entry of the log averages


def ship(config: Path, run: Path, commit: str, variants: list[str]) -> None:
    """Raises FileNotFoundError for a variant whose training is not finished, ValueError for one
    that the grid does not fine-tune.
    """
    settings = load_settings(config, AblationSettings)
    settings = with_shift(settings, open_source(settings))
    tuned = {cell.name: cell for cell in cells(settings) if cell.tuned is not None}
    for name in variants:
        if name not in tuned:
            raise ValueError(f"variant: expected one of {', '.join(tuned)}, got {name!r}")
    for cell in (tuned[name] for name in variants):
        trained = run / "work" / cell.tuned
        found = load_adapter(trained / "adapter")
        small = {
            name: value.bfloat16() if name.startswith("model.") else value
            for name, value in found.tensors.items()
        }
        folder = weights_of(settings.model) / "adapters" / cell.name
        save_adapter(dataclasses.replace(found, tensors=small), folder)
        report = json.loads((trained / "finished.json").read_text())
        losses = np.array(report["loss"])
        whole = losses[: len(losses) // EVERY * EVERY].reshape(-1, EVERY).mean(1)
        given = ("model", "data", "capture", "stage1", "stage2")
        values = settings.model_dump(mode="json")
        log = {
            "command": f"sla2 ablate --config {config} --out {run}",
            "commit": commit,
            "torch": torch.__version__,
            "variant": cell.variant.model_dump(mode="json"),
            "seed": cell.seed,
            "settings": {name: values[name] for name in given},
            "loss": {"steps": EVERY, "mean": [round(float(x), 6) for x in whole]},
        }
        write_json(folder / "training.json", log)
        print(f"{folder}: {report['steps']} steps, last loss {whole[-1]:.4f}")


if __name__ == "__main__":
    ship(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
