"""One small JSON file per (sha256 of the video, metric, hash of the settings): written whole,
verified when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path


def canonical(value: object) -> str:
    """JSON with sorted keys and no spaces; refuses NaN and infinities with a ValueError."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest(value: object) -> str:
    """The sha256 of a value's canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `data` in place only when complete and on disk. Raises OSError, leaving
    nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:80]}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class ResultStore:
    """Results under `root`/<metric>/<first two digits>/<video>-<settings>.json. Several runs may
    share one.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def path(self, video: str, metric: str, settings: str) -> Path:
        """Where the result of a video (sha256) lies, for a metric and a hash of its settings."""
        return self.root / metric / video[:2] / f"{video}-{settings[:16]}.json"

    def get(self, video: str, metric: str, settings: str) -> dict | None:
        """The stored result, or None if there is none, or if what is there is damaged or answers
        another question.
        """
        try:
            entry = json.loads(self.path(video, metric, settings).read_text(encoding="utf-8"))
            key = {"video": video, "metric": metric, "settings": settings}
            if entry["key"] == key and entry["digest"] == digest(entry["result"]):
                return entry["result"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def put(self, video: str, metric: str, settings: str, result: dict) -> None:
        """Store a result. Raises OSError (a full disk, an unwritable folder), leaving nothing
        half-written.
        """
        key = {"video": video, "metric": metric, "settings": settings}
        entry = {"key": key, "result": result, "digest": digest(result)}
        write_atomic(self.path(video, metric, settings), canonical(entry) + "\n")
