"""Built kernels in the cache folder: looked up without a lock, built under one, written whole,
checked on load.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sla2_kernels.cache import cache_folder


@dataclass(frozen=True)
class Artifact:
    """A built file and what was noted about it."""

    path: Path
    notes: dict[str, Any]


def folder() -> Path:
    """Where built kernels lie. Creates nothing."""
    return cache_folder() / "kernels"


def key_of(parts: Iterable[str]) -> str:
    """sha256 over the parts, each with its length, so that no two lists run together."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def lookup(key: str, suffix: str) -> Artifact | None:
    """The artifact if it is there and whole; a damaged one is set aside (renamed to *.bad)."""
    return _read(folder(), key, suffix)


def _read(where: Path, key: str, suffix: str) -> Artifact | None:
    binary, notes = where / f"{key}{suffix}", where / f"{key}{suffix}.json"
    try:
        about = json.loads(notes.read_text())
        whole = hashlib.sha256(binary.read_bytes()).hexdigest() == about["sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if whole:
        return Artifact(binary, about["notes"])
    for path in (notes, binary):  # the notes first: without them the binary is no artifact
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + ".bad"))
    return None


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _store(where: Path, key: str, suffix: str, data: bytes, notes: dict[str, Any]) -> Artifact:
    binary = where / f"{key}{suffix}"
    about = {"sha256": hashlib.sha256(data).hexdigest(), "notes": notes}
    _write(binary, data)
    _write(where / f"{key}{suffix}.json", json.dumps(about, indent=1).encode())
    return Artifact(binary, notes)


@cache
def _private_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sla2-kernels-")


def _instead(where: Path, error: Exception) -> Path:
    """A folder of this process alone, for a cache folder that cannot be written; it is said with a
    warning.
    """
    warnings.warn(
        f"{where}: expected a folder that can be written and locked, got {type(error).__name__}"
        f" ({error}); kernels are compiled again in each process. SLA2_CACHE names another folder.",
        RuntimeWarning,
        stacklevel=3,
    )
    return Path(_private_folder().name)


def get(key: str, suffix: str, build: Callable[[], tuple[bytes, dict[str, Any]]]) -> Artifact:
    """The artifact of `key`, built if it is missing.

    Of many processes that ask at once, one builds and the others wait for it. Where the cache
    folder cannot be written, a RuntimeWarning says so, and the file goes to a folder that lives as
    long as this process.

    Args:
        suffix: of the file's name.
        build: returns the file's bytes and notes for its JSON; what it raises goes through.
    """
    from filelock import FileLock

    if found := lookup(key, suffix):
        return found
    where = folder()
    try:
        where.mkdir(parents=True, exist_ok=True)
        lock = FileLock(where / f"{key}.lock")
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        private = _instead(where, error)
        return _read(private, key, suffix) or _store(private, key, suffix, *build())
    try:
        if found := lookup(key, suffix):
            return found
        # Those of a process killed in mid-write: nobody else writes under the lock.
        for left in where.glob(f"{key}*.tmp"):
            left.unlink(missing_ok=True)
        data, notes = build()
        try:
            return _store(where, key, suffix, data, notes)
        except OSError as error:
            return _store(_instead(where, error), key, suffix, data, notes)
    finally:
        lock.release()


def contents() -> dict[str, Any]:
    """What the cache holds: {"folder", "artifacts", "bytes", "damaged", "writable"}."""
    where = folder()
    files = list(where.glob("*")) if where.is_dir() else []
    existing = next(path for path in (where, *where.parents) if path.exists())
    return {
        "folder": str(where),
        "artifacts": sum(path.suffix == ".json" for path in files),
        "bytes": sum(path.stat().st_size for path in files),
        "damaged": sum(
            path.suffix == ".bad" and not path.name.endswith(".json.bad") for path in files
        ),
        "writable": os.access(existing, os.W_OK),
    }
