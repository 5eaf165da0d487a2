"""How the numba kernels are declared, cached in the project's cache folder, and run on several
threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

# Without "nnan" and "ninf": NaN and inf must come out as NaN or inf. Division and order of sums are
# free.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

Array = npt.NDArray[Any]
Typed = tuple[Any, Callable[..., Any]]  # of an @intrinsic: signature, code generator
Function = TypeVar("Function", bound=Callable[..., Any])

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_registered: list[Any] = []
_cached: set[int] = set()
_compiled: set[tuple[int, np.dtype[Any]]] = set()
_seconds: dict[str, float] = {}
_stages: dict[str, float] | None = None


def inner(function: Function) -> Function:
    """A function that kernels call; inlined into them.

    Left to LLVM, a call may stay and bind to whichever copy of the function is loaded first: one
    that was compiled for another kernel, with its sums in another order. A process that compiled
    the kernels then rounds otherwise than one that found them in the cache.
    """
    compiled: Function = numba.njit(
        function, fastmath=FASTMATH, error_model="numpy", nogil=True, forceinline=True
    )
    return compiled


def exact_inner(function: Function) -> Function:
    """As `inner`, without fast math: every operation is rounded as written."""
    compiled: Function = numba.njit(function, error_model="numpy", nogil=True, forceinline=True)
    return compiled


def exact_kernel(function: Function) -> Function:
    """As `kernel`, without fast math."""
    dispatcher: Function = numba.njit(function, error_model="numpy", nogil=True)
    _registered.append(dispatcher)
    return dispatcher


def kernel(function: Function) -> Function:
    """A compiled function (*arrays and numbers, lo, hi) over the work items lo to hi, for `run`."""
    dispatcher: Function = numba.njit(function, fastmath=FASTMATH, error_model="numpy", nogil=True)
    _registered.append(dispatcher)
    return dispatcher


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _enable_cache() -> None:
    """Point numba's cache of every kernel at the project's cache folder; a folder that cannot be
    written is no error.
    """
    from sla2_kernels.cache import cache_folder

    folder = cache_folder() / "numba" / _fingerprint()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            return
    except OSError:
        return
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        for dispatcher in _registered:
            if id(dispatcher) not in _cached:
                dispatcher.enable_caching()
                _cached.add(id(dispatcher))
    finally:
        numba.config.CACHE_DIR = before


def compile_seconds() -> dict[str, float]:
    """Seconds that this process spent compiling (or loading from the cache), by kernel."""
    return dict(_seconds)


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """A dict that receives the seconds each kernel runs inside the `with`, by name."""
    global _stages
    _stages = {}
    try:
        yield _stages
    finally:
        _stages = None


def _drop_cached(dispatcher: Any) -> None:
    """Remove what the cache holds of a kernel."""
    folder = dispatcher.stats.cache_path
    for path in Path(folder).glob(f"*.{dispatcher.py_func.__name__}-*") if folder else ():
        path.unlink(missing_ok=True)


def _compile(dispatcher: Any, arguments: tuple[Any, ...]) -> None:
    with _lock:
        _enable_cache()
        start = time.perf_counter()
        signature = tuple(numba.typeof(x) for x in arguments)
        try:
            dispatcher.compile(signature)
        except numba.core.errors.NumbaError:
            raise
        # a damaged entry fails as pickle pleases, a full disk with OSError after the code was made
        except Exception:
            _drop_cached(dispatcher)
            dispatcher.compile(signature)
        name = dispatcher.py_func.__name__
        _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - start
        _compiled.add((id(dispatcher), arguments[0].dtype))


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="sla2")
        return _pools[threads]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        after_in_child=_pools.clear
    )  # the parent's threads do not exist in a forked child


def run(dispatcher: Any, items: int, threads: int, *arguments: Any) -> None:
    """Call a kernel on all of `items` work items, in up to 4 ranges a thread.

    Each item is computed whole by one thread. The first array's dtype fixes that of the others.
    """
    arguments = (*arguments, 0, items)
    if (
        id(dispatcher),
        arguments[0].dtype,
    ) not in _compiled:  # the first array's dtype fixes all the others'
        _compile(dispatcher, arguments)
    start = time.perf_counter()
    _spread(dispatcher, items, threads, arguments)
    if _stages is not None:
        name = dispatcher.py_func.__name__
        _stages[name] = _stages.get(name, 0.0) + time.perf_counter() - start


def _spread(dispatcher: Any, items: int, threads: int, arguments: tuple[Any, ...]) -> None:
    if threads <= 1 or items <= 1:
        dispatcher(*arguments)
        return
    ranges = min(items, 4 * threads)
    edges = [items * i // ranges for i in range(ranges + 1)]
    turn = pairwise(edges)
    guard = threading.Lock()

    def work() -> None:
        while True:
            with guard:
                part = next(turn, None)
            if part is None:
                return
            dispatcher(*arguments[:-2], *part)

    others = [_pool(threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
