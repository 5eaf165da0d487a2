"""The optional libraries: which extra of sla2-eval brings each, and one line for a missing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# import name -> extra, as in this package's pyproject.toml
EXTRAS = {
    "jinja2": "report",
    "lpips": "metrics",
    "open_clip": "metrics",
    "pyiqa": "musiq",
    "ray": "ray",
    "timm": "metrics",
    "torchcodec": "torchcodec",
    "torchmetrics": "metrics",
    "torchvision": "metrics",
}


def how_to_get(module: str) -> str:
    """The command that installs the library imported as `module`."""
    wanted = f"'sla2-eval[{EXTRAS[module]}]'" if module in EXTRAS else module
    return f"pip install {wanted}"


@contextmanager
def needed_for(purpose: str) -> Iterator[None]:
    """Around the import of an optional library; `purpose` says what it is for.

    Raises ModuleNotFoundError in one line that names the library and its extra if it is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise  # a fault inside the library, or of ours
        raise ModuleNotFoundError(
            f"{error.name}: expected it for {purpose}, got none ({how_to_get(error.name)})",
            name=error.name,
        ) from None
