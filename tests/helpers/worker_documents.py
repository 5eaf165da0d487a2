"""Runs the Python blocks of documents, each document as one script: python worker_documents.py
OUT DOCUMENT... writes {document: traceback or None} to OUT.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
SHORTER = {"4096": "400"}  # tokens of the README's example


def script_of(document: str) -> str:
    """Its Python blocks; every other line is empty, so that line numbers are the document's."""
    lines, inside = [], False
    for line in (ROOT / document).read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    script = "\n".join(lines)
    for printed, used in SHORTER.items():
        script = script.replace(printed, used)
    return script


def published(*_, **__):
    """Stands for what WanPipeline.from_pretrained would fetch: heads of the 1.3B model, one layer,
    random weights.
    """
    from helpers import families, models

    heads = dict(num_attention_heads=12, attention_head_dim=128)
    return families.pipeline("wan", models.wan(num_layers=1, **heads))


def prepared() -> dict:
    """The names that documents take for granted, and the adapter that they load."""
    from sla2_core import SLA2Config
    from sla2_core.integrations.diffusers import apply_sla2

    pipe = published()
    config = SLA2Config(head_dim=128, num_heads=12, topk=0.03)
    handle = apply_sla2(pipe.transformer, config)
    handle.save("my_adapter")
    handle.remove()
    return {"__name__": "__main__", "pipe": pipe}


def run(document: str) -> str | None:
    """The traceback of what a document's code raises, None if it runs."""
    try:
        exec(compile(script_of(document), document, "exec"), prepared())
    except Exception:
        return traceback.format_exc()


if __name__ == "__main__":
    out = Path(sys.argv[1]).absolute()
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("diffusers.WanPipeline.from_pretrained", published),
    ):
        os.chdir(folder)
        for document in sys.argv[2:]:
            found[document] = run(document)
        os.chdir(out.parent)
    out.write_text(json.dumps(found))
