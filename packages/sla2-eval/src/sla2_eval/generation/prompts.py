"""The prompts to sample: text files of one a line, and VBench's and VBench-2.0's files as they are,
with repeated prompts, longer ones for the model, and dimensions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sla2_eval.videos.manifest import video_name


@dataclass(frozen=True)
class Prompt:
    """One prompt: what its videos are called after and scored against.

    `text`: what the model is given instead, where that is not the prompt itself. `dimensions`: of
    the benchmark, for which it is scored. `samples`: how many videos of it the benchmark asks for.
    `cut`: whether the benchmark names files by the first characters of long prompts.
    """

    prompt: str
    text: str | None = None
    dimensions: tuple[str, ...] = ()
    samples: int | None = None
    cut: bool = False


@dataclass(frozen=True)
class Request:
    """One video to sample: the prompt, the number of the video for this prompt, the seed of its
    noise; what the model is given if not the prompt, the benchmark's dimensions, and the file's
    name.
    """

    prompt: str
    index: int
    seed: int
    text: str | None = None
    dimensions: tuple[str, ...] = ()
    file_name: str = ""

    def __post_init__(self) -> None:
        if not self.file_name:
            object.__setattr__(self, "file_name", video_name(self.prompt, self.index))

    @property
    def is_image(self) -> bool:
        """Whether the model makes images, by the name of the file."""
        return not self.file_name.endswith(".mp4")

    @property
    def given(self) -> str:
        """What the model is given."""
        return self.prompt if self.text is None else self.text


def read_prompts(
    path: str | Path,
    *,
    names: str | Path | None = None,
    info: str | Path | None = None,
    dimensions: Sequence[str] = (),
) -> list[Prompt]:
    """The prompts of a file, each once, in its order: a UTF-8 text file of one a line, or VBench's
    full-info JSON, which has their dimensions too.

    Args:
        names: a file of as many prompts, line by line those that the lines of `path` are longer
            versions of: the model is given the lines, the videos are named and scored by these.
            Of a repeated one the first line is taken.
        info: the full-info JSON of the benchmark, for the dimensions of a text file's prompts.
        dimensions: only prompts of one of these.

    Raises:
        ValueError: a file that is missing, empty or of another form, files of different lengths, or
            a dimension that no prompt has; names the file.
    """
    path = Path(path)
    found = _read(path)
    if names is not None:
        original = _read(Path(names))
        if len(original) != len(found):
            raise ValueError(
                f"names: expected a prompt for each of the {len(found)} of {path}, got"
                f" {len(original)} in {names}"
            )
        found = [
            replace(short, text=None if long.prompt == short.prompt else long.prompt)
            for short, long in zip(original, found, strict=True)
        ]
    if info is not None:
        found = _with_dimensions(found, _read(Path(info)), info)
    known = {dimension for prompt in found for dimension in prompt.dimensions}
    for dimension in dimensions:
        if dimension not in known:
            names_known = ", ".join(sorted(known)) or "none, as the file has no dimensions"
            raise ValueError(f"dimensions: expected names among {names_known}, got {dimension!r}")
    if dimensions:
        found = [prompt for prompt in found if set(prompt.dimensions) & set(dimensions)]
    once: dict[str, Prompt] = {}
    for prompt in found:
        first = once.setdefault(prompt.prompt, prompt)
        both = dict.fromkeys((*first.dimensions, *prompt.dimensions))
        once[prompt.prompt] = replace(first, dimensions=tuple(both))
    return [_as_benchmark(prompt, known) for prompt in once.values()]


def _as_benchmark(prompt: Prompt, known: set[str]) -> Prompt:
    """With the number of videos and the naming of VBench, or of VBench-2.0, whose dimensions begin
    with capitals.
    """
    if not known:
        return prompt
    second = any(dimension[:1].isupper() for dimension in known)
    rest, special, many = (3, "Diversity", 20) if second else (5, "temporal_flickering", 25)
    samples = many if special in prompt.dimensions else rest
    return replace(prompt, samples=samples, cut=second)


def _with_dimensions(prompts: list[Prompt], info: list[Prompt], path: str | Path) -> list[Prompt]:
    dimensions: dict[str, tuple[str, ...]] = {}
    for entry in info:
        before = dimensions.get(entry.prompt, ())
        dimensions[entry.prompt] = tuple(dict.fromkeys((*before, *entry.dimensions)))
    if unknown := next((p.prompt for p in prompts if p.prompt not in dimensions), None):
        raise ValueError(f"info: expected every prompt in {path}, got none like {unknown[:80]!r}")
    return [replace(prompt, dimensions=dimensions[prompt.prompt]) for prompt in prompts]


def _read(path: Path) -> list[Prompt]:
    """Every prompt of a file, repeated ones too."""
    what = "a text file of one prompt a line, or VBench's full-info JSON"
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: expected {what}, got nothing there") from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected {what}, in UTF-8, got {error}") from None
    if path.suffix.lower() == ".json":
        return _full_info(path, content)
    found = [Prompt(line.strip()) for line in content.split("\n") if line.strip()]
    if not found:
        raise ValueError(f"{path}: expected one prompt a line, got none")
    return found


def _full_info(path: Path, content: str) -> list[Prompt]:
    """VBench's list of {"prompt_en", "dimension"}, or VBench-2.0's {name: {"caption",
    "dimension"}}.
    """
    try:
        rows: Any = json.loads(content)
        rows = list(rows.values()) if isinstance(rows, dict) else rows
        found = []
        for row in rows:
            prompt = row["prompt_en"] if "prompt_en" in row else row["caption"]
            listed = row.get("dimension", [])
            listed = [listed] if isinstance(listed, str) else listed
            if not isinstance(prompt, str) or not all(isinstance(name, str) for name in listed):
                raise TypeError(f"{str(row)[:80]}")
            found.append(Prompt(prompt.strip(), dimensions=tuple(listed)))
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        form = '[{"prompt_en": ..., "dimension": [...]}]'
        raise ValueError(f"{path}: expected {form}, got {error}") from None
    if not found:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    return found


def plan(
    prompts: Sequence[str | Prompt],
    indices: Sequence[int] | None,
    seed: int,
    *,
    suffix: str = ".mp4",
) -> list[Request]:
    """A request for each prompt and index; `indices` None: as many as the benchmark asks for.
    `suffix`: of the files, sampling.suffix_of(model).

    Different prompts have different file names: where two would have the same, because their first
    characters are alike or only characters differ that no file name may have, the later ones carry
    eight digits of their sha256. Raises ValueError for a repeated prompt, and without indices for
    one of no benchmark.
    """
    seen: set[str] = set()
    taken: set[str] = set()
    requests = []
    for prompt in (p if isinstance(p, Prompt) else Prompt(p) for p in prompts):
        if prompt.prompt in seen:
            raise ValueError(
                f"prompts: expected each prompt once, got {prompt.prompt[:80]!r} again"
            )
        seen.add(prompt.prompt)
        if indices is None and prompt.samples is None:
            raise ValueError(
                f"videos_per_prompt: expected a number for {prompt.prompt[:80]!r}, which is of no"
                " benchmark, got none"
            )
        mark = ""
        if _name(prompt, 0, mark, suffix) in taken:
            mark = f" {hashlib.sha256(prompt.prompt.encode()).hexdigest()[:8]}"
        taken.add(_name(prompt, 0, mark, suffix))
        for index in range(prompt.samples or 0) if indices is None else indices:
            name = _name(prompt, index, mark, suffix)
            requests.append(
                Request(prompt.prompt, index, seed, prompt.text, prompt.dimensions, name)
            )
    return requests


def _name(prompt: Prompt, index: int, mark: str, suffix: str) -> str:
    return video_name(prompt.prompt, index, mark=mark, cut=prompt.cut, suffix=suffix)
