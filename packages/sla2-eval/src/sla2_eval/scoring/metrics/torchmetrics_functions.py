"""torchmetrics' image functions without torchmetrics' `__init__`, which imports scipy, transformers
and torchvision, and through it torch's compiler.

`import torchmetrics.functional.image` takes a process 7.3 s of processor time, torch alone 1.5 s,
and what is here 2.7 s (an AMD EPYC, the least of several): every worker would pay the difference.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType

_PACKAGES = ("torchmetrics", "torchmetrics.functional", "torchmetrics.functional.image")


def image_function(module: str, name: str) -> Callable:
    """`torchmetrics.functional.image.<module>.<name>`, imported with its own dependencies alone.

    The parent packages are empty while it is imported and forgotten afterwards, so that a later
    `import torchmetrics` is the ordinary one. Where the library's layout does not allow that, the
    ordinary import is used.
    """
    if "torchmetrics" not in sys.modules:
        try:
            return _import_alone(module, name)
        except (ImportError, AttributeError):
            pass
    return getattr(importlib.import_module(f"torchmetrics.functional.image.{module}"), name)


def _import_alone(module: str, name: str) -> Callable:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("torchmetrics: not a package")
    root = spec.submodule_search_locations[0]
    try:
        for package in _PACKAGES:
            empty = ModuleType(package)
            empty.__path__ = [root + package.removeprefix("torchmetrics").replace(".", "/")]
            vars(empty)["_logger"] = logging.getLogger("torchmetrics")
            sys.modules[package] = empty
        return getattr(importlib.import_module(f"torchmetrics.functional.image.{module}"), name)
    finally:
        for loaded in [key for key in sys.modules if key.partition(".")[0] == "torchmetrics"]:
            del sys.modules[loaded]
