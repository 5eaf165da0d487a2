"""Which videos to score: a folder in VBench's naming or with a JSONL manifest, and two folders
paired by name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sla2_eval.videos.image import SUFFIXES as PICTURES

MANIFESTS = ("manifest.jsonl", "metadata.jsonl")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")  # that a folder is looked through for
MAX_PROMPT = 180  # characters of a long prompt in a file name, as in VBench-2.0
_MAX_BYTES = 240  # of a file name without number and suffix; file systems take 255
_NAME = re.compile(r"^(?P<prompt>.+)-(?P<index>\d+)$", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One video to score: its name inside the folder, its path, and what is known of it."""

    file_name: str
    path: Path
    prompt: str
    index: int = 0
    seed: int | None = None
    dimensions: tuple[str, ...] | None = None  # of the benchmark, for which it is scored
    lossless: Path | None = None  # the same frames before the codec's loss, which pairs compare


def video_name(
    prompt: str, index: int, *, mark: str = "", cut: bool = False, suffix: str = ".mp4"
) -> str:
    """VBench's file name `{prompt}-{index}.mp4`; separators become spaces.

    A prompt that no file system would take whole is cut to its first 180 characters, and with `cut`
    any longer one, as VBench-2.0 names its videos. `mark` follows the prompt.
    """
    text = re.sub(r"[/\\\x00-\x1f]+", " ", prompt).strip().lstrip(".") or "video"
    if cut or len((text + mark).encode()) > _MAX_BYTES:
        text = text[:MAX_PROMPT]
    while len((text + mark).encode()) > _MAX_BYTES:
        text = text[:-1]
    return f"{text}{mark}-{index}{suffix}"


def parse_name(file_name: str) -> tuple[str, int]:
    """Prompt and index of a file name; a name without `-{index}` is all prompt, index 0."""
    stem = Path(file_name).stem
    match = _NAME.match(stem)
    return (match["prompt"], int(match["index"])) if match else (stem, 0)


def resolve_inside(root: Path, name: object, where: str, roots: Sequence[Path] = ()) -> Path:
    """`root`/`name`, refused with a ValueError that begins with `where` if it is absolute, climbs,
    or links out of the root, unless into one of `roots`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where}: expected a file name, got {name!r}")
    if not _is_unicode(name):
        raise ValueError(f"{where}: expected a file name in UTF-8, got {name!r}")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: expected a path inside {root}, got {name!r}")
    path = root / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(allowed.resolve()) for allowed in (root, *roots)):
        raise ValueError(
            f"{where}: expected a path inside {root}, got {name!r}, which links out of it; --root"
            f" allows what lies in {real.parent}"
        )
    return path


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8, which bytes of other encodings in file names and
    lone surrogates cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(manifest: Path, root: Path, roots: Sequence[Path]) -> list[Entry]:
    entries, seen = [], set()
    try:
        lines = manifest.read_text(encoding="utf-8-sig").split(
            "\n"
        )  # a prompt may hold what else ends lines
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{manifest}: expected UTF-8 text, one JSON object a line, got {error}"
        ) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{manifest} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected a JSON object, got {line[:80]!r}") from error
        if not isinstance(row, dict) or "file_name" not in row:
            raise ValueError(
                f'{where}: expected {{"file_name": ..., "prompt": ...}}, got {line[:80]!r}'
            )
        path = resolve_inside(root, row["file_name"], where, roots)
        name = path.relative_to(root).as_posix()
        if name in seen:
            raise ValueError(f"{where}: expected each file once, got {name!r} again")
        seen.add(name)
        by_name, number_by_name = parse_name(name)
        prompt = row.get("prompt", row.get("caption", by_name))
        index, seed = row.get("index", number_by_name), row.get("seed")
        if (
            not isinstance(prompt, str)
            or not _is_unicode(prompt)
            or not isinstance(index, int)
            or not isinstance(seed, int | None)
        ):
            raise ValueError(
                f"{where}: expected a text prompt and whole index and seed, got {line[:80]!r}"
            )
        dimensions = row.get("dimensions")
        if dimensions is not None:
            if not isinstance(dimensions, list):
                raise ValueError(f"{where}: expected a list of dimensions, got {dimensions!r}")
            dimensions = tuple(dimensions)
        lossless = row.get("lossless")
        if lossless is not None:
            lossless = resolve_inside(root, lossless, where, roots)
        entries.append(Entry(name, path, prompt, index, seed, dimensions, lossless))
    return entries


def read_manifest(videos: str | Path, roots: Sequence[str | Path] = ()) -> list[Entry]:
    """The videos of a folder (its manifest.jsonl, else every video in it, else every picture), of a
    JSONL manifest file, or one video or picture, sorted by name. Symbolic links may lead out of the
    folder into `roots`.

    Raises ValueError naming the file and line for a manifest of another form or a path that leaves
    the folder, and where there is no video at all. Whether each file exists and decodes is found
    out when it is scored.
    """
    videos, allowed = Path(videos), [Path(root) for root in roots]
    if videos.is_file() and videos.suffix.lower() in (*VIDEOS, *PICTURES):
        entries = [Entry(videos.name, videos, *parse_name(videos.name))]
    elif videos.is_file():
        entries = _read_lines(videos, videos.parent, allowed)
    elif videos.is_dir():
        if manifest := _manifest_in(videos):
            entries = _read_lines(manifest, videos, allowed)
        else:
            entries = [
                Entry(n, resolve_inside(videos, n, str(videos), allowed), *parse_name(n))
                for n in _media(videos)[0]
            ]
    else:
        raise ValueError(
            f"{videos}: expected a folder of videos or pictures, a JSONL manifest, or one video,"
            " got nothing there"
        )
    if not entries:
        raise ValueError(
            f"{videos}: expected videos ({', '.join(VIDEOS)}) or pictures ({', '.join(PICTURES)})"
            " named {prompt}-{index}, or a manifest, got none"
        )
    return sorted(entries, key=lambda entry: entry.file_name)


def _manifest_in(folder: Path) -> Path | None:
    return next((folder / name for name in MANIFESTS if (folder / name).is_file()), None)


def _media(folder: Path) -> tuple[list[str], list[str]]:
    """The files that a folder without a manifest stands for, and the other videos and pictures."""
    here = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    videos = [name for name in here if name.lower().endswith(VIDEOS)]
    pictures = [name for name in here if name.lower().endswith(PICTURES)]
    others = [name for name in here if name.lower().endswith((".gif", ".flv", ".wmv", ".ts"))]
    return (videos, pictures + others) if videos else (pictures, others)


def holds_media(folder: Path) -> bool:
    """Whether it is a folder with a manifest, or with videos or pictures themselves."""
    return folder.is_dir() and (_manifest_in(folder) is not None or bool(_media(folder)[0]))


def left_out(videos: str | Path, entries: Sequence[Entry]) -> dict[str, int]:
    """How many videos and pictures of a folder are not among its `entries`, by their suffix: those
    that its manifest does not list, pictures beside videos, and kinds that are not read.
    """
    folder = Path(videos)
    if not folder.is_dir():
        return {}
    chosen, others = _media(folder)
    known = {entry.file_name for entry in entries}
    names = [name for name in chosen if name not in known] + others
    return dict(sorted(Counter(Path(name).suffix.lower() for name in names).items()))


def pair(videos: list[Entry], references: list[Entry]) -> list[tuple[Entry, Entry | None]]:
    """Each video with the reference of the same file name, which takes the video's prompt and
    number, or None.
    """
    by_name = {entry.file_name: entry for entry in references}
    pairs = [(entry, by_name.get(entry.file_name)) for entry in videos]
    return [
        (v, r and replace(r, prompt=v.prompt, index=v.index, seed=v.seed, dimensions=v.dimensions))
        for v, r in pairs
    ]


def compared(video: Entry, reference: Entry) -> tuple[Path, Path]:
    """The files whose pixels a paired metric compares: both lossless, or both as encoded."""
    if video.lossless and reference.lossless:
        return video.lossless, reference.lossless
    return video.path, reference.path
