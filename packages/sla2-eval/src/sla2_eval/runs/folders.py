"""What a folder of results is made with: noted when it is begun, and compared when a run goes on in
it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sla2_eval.runs.store import canonical, write_atomic

# in the folder of `sla2 score`: {"videos", "reference"?}, the paths that were scored, for the
# report
INPUTS = "inputs.json"


def note_settings(path: Path, values: dict, *, replace: bool = False) -> None:
    """Write to `path` what its folder is made with; `replace` where the folder holds nothing made
    yet.

    Raises ValueError, naming folder and key, if it was made with something else, or the file if it
    cannot be read.
    """
    settings, folder = json.loads(canonical(values)), path.parent
    if path.exists() and not replace:
        try:
            before = dict(json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a JSON object of settings, got: {error}") from None
        if different := _difference("", before, settings):
            key, was, now = different
            raise ValueError(
                f"{folder}: expected a new folder or one generated with the same settings, but"
                f" {key} was {canonical(was)[:120]} and is {canonical(now)[:120]}"
            )
    else:
        write_atomic(path, json.dumps(settings, indent=2) + "\n")


def _difference(key: str, before: Any, after: Any) -> tuple[str, Any, Any] | None:
    """The first setting that differs: its key with dots, and both values (None: there is none)."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return None if before == after else (key, before, after)
    parts = (
        _difference(f"{key}.{name}".removeprefix("."), before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
    )
    return next((found for found in parts if found), None)
