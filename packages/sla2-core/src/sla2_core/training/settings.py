"""Checks of the settings of capture and both stages: one line that names the field for a value outside its range."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any


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
    "fractions in (0, 1]": lambda x: isinstance(x, tuple | list) and x and all(_number(k) and 0 < k <= 1 for k in x),
    "a list of names": lambda x: isinstance(x, tuple | list) and x and all(isinstance(n, str) for n in x),
}


def check_fields(config: Any, expected: Mapping[str, Collection[str]], optional: Collection[str] = ()) -> None:
    """Check the fields of a configuration.

    Args:
        expected: {what is expected, one of _FITS: names of fields}. optional: fields that may also be None.

    Raises:
        ValueError: a value of another kind; the message names the field.
    """
    for what, names in expected.items():
        for name in names:
            value = getattr(config, name)
            if not ((value is None and name in optional) or _FITS[what](value)):
                raise ValueError(f"{name}: expected {what}, got {value!r}")
