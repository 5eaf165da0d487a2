"""Checks of the settings of capture and of both stages: each field's range, and whether a folder's
run has the same ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sla2_core.adapter import read_json


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


_FITS = {
    "an integer >= 1": lambda x: _whole(x) and x >= 1,
    "an integer >= 0": lambda x: _whole(x) and x >= 0,
    "a number >= 0": lambda x: _number(x) and x >= 0,
    "a number > 0": lambda x: _number(x) and x > 0,
    "a number in [0, 1]": lambda x: _number(x) and 0 <= x <= 1,
    "a number in [0, 1)": lambda x: _number(x) and 0 <= x < 1,
    "True or False": lambda x: isinstance(x, bool),
    "fractions in (0, 1]": lambda x: (
        isinstance(x, tuple | list) and x and all(_number(k) and 0 < k <= 1 for k in x)
    ),
    "a range in [0, 1]": lambda x: (
        isinstance(x, tuple | list)
        and len(x) == 2
        and all(map(_number, x))
        and 0 <= x[0] < x[1] <= 1
    ),
    "a list of names": lambda x: (
        isinstance(x, tuple | list) and x and all(isinstance(n, str) for n in x)
    ),
}


def check_fields(
    config: Any, expected: Mapping[str, Collection[str]], optional: Collection[str] = ()
) -> None:
    """Check the fields of a configuration.

    Args:
        config: any object with these fields.
        expected: {what is expected, a key of _FITS: names of fields}. optional: fields that may
            also be None.

    Raises:
        ValueError: a value of another kind; the message names the field.
    """
    for what, names in expected.items():
        for name in names:
            value = getattr(config, name)
            if not ((value is None and name in optional) or _FITS[what](value)):
                raise ValueError(f"{name}: expected {what}, got {value!r}")


def check_same(path: Path, wanted: Mapping[str, Any]) -> None:
    """Check that the JSON file of a folder's settings holds the `wanted` ones, whatever else it
    holds.

    Raises:
        ValueError: another value; the message names the file and the field. FileNotFoundError: no
            such file.
    """
    different = _difference("", json.loads(json.dumps(wanted)), read_json(path))
    if different:
        name, given, found = different
        raise ValueError(
            f"{path}: expected {name}={given!r} as given, got {found!r}; use a new folder"
        )


def _difference(name: str, wanted: Any, found: Any) -> tuple[str, Any, Any] | None:
    if not (isinstance(wanted, dict) and isinstance(found, dict)):
        return None if wanted == found else (name, wanted, found)
    parts = (_difference(key, value, found.get(key)) for key, value in wanted.items())
    return next((part for part in parts if part), None)
