"""What a folder of results is made with: noted when it is begun, and compared when a run goes on in
it.
"""

from __future__ import annotations

import json
from pathlib import Path

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
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ValueError(
                    f"{folder}: expected a new folder or one generated with the same settings, but"
                    f" {key} was {canonical(before.get(key))[:120]} and is"
                    f" {canonical(settings.get(key))[:120]}"
                )
    else:
        write_atomic(path, json.dumps(settings, indent=2) + "\n")
