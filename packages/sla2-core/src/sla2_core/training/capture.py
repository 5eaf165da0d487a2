"""Capture of Q, K, V from a running model: sampled layers, heads and timesteps, as safetensors
shards with an index.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sla2_core.adapter import read_json, write_json, write_tensors
from sla2_core.attention import SLA2Attention
from sla2_core.integrations.handle import SLA2Handle, timestep_of
from sla2_core.training.settings import check_fields, check_same

INDEX_NAME = "index.json"


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """What to keep of a running model.

    Args:
        layers: layers to keep; None keeps every layer SLA2 was applied to.
        layers_per_sample: how many of them each sample keeps, drawn at random; None keeps all.
        heads: heads to keep of each layer, drawn per sample; None keeps all.
        every: keep one in `every` forward calls of the transformer, from a random one on; 1 keeps
            all.
        max_bytes: size the shards may reach together; the capture ends before the shard that would
            pass it.
        dtype: "float32", "bfloat16" or "float16"; None keeps the model's.
        seed: of everything drawn here.
    """

    layers: tuple[int, ...] | None = None
    layers_per_sample: int | None = None
    heads: int | None = None
    every: int = 1
    max_bytes: int = 4 << 30
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "an integer >= 1": ("layers_per_sample", "heads", "every", "max_bytes"),
                "an integer >= 0": ("seed",),
            },
            optional=("layers_per_sample", "heads"),
        )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise ValueError(
                f"dtype: expected float32, bfloat16, float16 or None, got {self.dtype!r}"
            )


@dataclass(frozen=True)
class Captured:
    """One attention call.

    Attributes:
        layer, sample: which layer, and which call of run() it belongs to.
        timestep: the model's, 0 where it is not known.
        heads: which of the layer's heads these are, H' of them.
        q, k, v: (B, H', N, d) in the token order, after the rotary embedding.
        text_tokens: so many tokens at the end are text.
        kv_lengths: valid keys of each of the B items; None if all are.
    """

    layer: int
    sample: int
    timestep: float
    heads: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    text_tokens: int = 0
    kv_lengths: tuple[int, ...] | None = None


class AnyCaptures(Protocol):
    """What stage 1 reads: Captures, Recorded, or captures of your own.

    Attributes:
        settings: what fixes the captures, JSON values; those of SLA2Config.order_geometry() are of
            the order of their tokens.
    """

    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Where they are, for messages."""
        ...

    @property
    def calls(self) -> list[dict[str, Any]]:
        """A record of each call: its "layer" and "sample", and a "shard" and "key" that together
        name it.
        """
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Which layers there are calls of, ascending."""
        ...

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        ...

    def load(self, call: dict[str, Any], device: torch.device | str = "cpu") -> Captured:
        """Read one call, a record of `calls`, to a device."""
        ...


class Captures:
    """A folder of captures, as capture() writes it; iterating over it loads every call.

    Attributes:
        settings: {"config", "model"} and SLA2Config.order_geometry(), what the captures were made
            with.
        samples: {"sample", "bytes", "calls"} of each sample.
        full: whether the capture ended at CaptureConfig.max_bytes.

    Raises:
        FileNotFoundError, ValueError: the folder has no index, or one that cannot be read; the
            message names the file.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        content = read_json(self.folder / INDEX_NAME)
        if content.get("format_version") != 1:
            raise ValueError(
                f"{self.folder / INDEX_NAME}: expected format_version 1, got"
                f" {content.get('format_version')!r}"
            )
        self.settings: dict[str, Any] = content["settings"]
        self.samples: list[dict[str, Any]] = content["samples"]
        self.full: bool = content["full"]

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.folder)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """What there is: {"shard", "key", "layer", "sample", "timestep", "heads", "shape",
        "text_tokens", "kv_lengths"} of each call.
        """
        return [call for sample in self.samples for call in sample["calls"]]

    @property
    def layers(self) -> tuple[int, ...]:
        """Which layers there are calls of, ascending."""
        return tuple(sorted({call["layer"] for call in self.calls}))

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(sample["bytes"] for sample in self.samples)

    def load(self, call: dict[str, Any], device: torch.device | str = "cpu") -> Captured:
        """Read one call, a record of `calls`, to a device; only its own tensors, not the whole
        shard.

        Raises FileNotFoundError or ValueError naming a shard that is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.folder / call["shard"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a shard of the index, found none")
        try:
            with safe_open(path, "pt") as shard:
                q, k, v = (shard.get_tensor(f"{call['key']}.{x}").to(device) for x in "qkv")
        except SafetensorError as error:
            raise ValueError(f"{path}: expected a readable shard, got: {error}") from None
        lengths = call["kv_lengths"]
        return Captured(
            call["layer"],
            call["sample"],
            call["timestep"],
            tuple(call["heads"]),
            q,
            k,
            v,
            call["text_tokens"],
            None if lengths is None else tuple(lengths),
        )

    def __iter__(self) -> Iterator[Captured]:
        return (self.load(call) for call in self.calls)


class _Recorder:
    """Collects the calls of one sample; a forward pre-hook counts the transformer's calls and notes
    their timestep.
    """

    def __init__(self, sample: int, layers: Sequence[int], num_heads: int, config: CaptureConfig):
        rng = np.random.default_rng([config.seed, sample])
        kept = config.layers_per_sample or len(layers)
        if kept > len(layers):
            raise ValueError(
                f"layers_per_sample: expected at most the {len(layers)} layers there are, got"
                f" {kept}"
            )
        if (config.heads or 1) > num_heads:
            raise ValueError(f"heads: expected at most the model's {num_heads}, got {config.heads}")
        self.layers = {int(i) for i in rng.choice(layers, size=kept, replace=False)}
        self.heads = {
            i: sorted(
                int(h) for h in rng.choice(num_heads, size=config.heads or num_heads, replace=False)
            )
            for i in sorted(self.layers)
        }
        self.first = int(rng.integers(config.every))
        self.sample, self.config = sample, config
        self.forward, self.timestep = -1, 0.0
        self.tensors: dict[str, Tensor] = {}
        self.calls: list[dict[str, Any]] = []

    def hook(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forward += 1
        self.timestep = timestep_of(transformer, args, kwargs)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        text_tokens: int = 0,
        kv_lengths: Tensor | None = None,
    ) -> None:
        if layer not in self.layers or self.forward % self.config.every != self.first:
            return
        heads = self.heads[layer]
        key = f"forward{self.forward}.layer{layer}"
        dtype = getattr(torch, self.config.dtype) if self.config.dtype else q.dtype
        for name, x in zip("qkv", (q, k, v)):
            self.tensors[f"{key}.{name}"] = x.detach()[:, heads].to("cpu", dtype).contiguous()
        lengths = None if kv_lengths is None else [int(n) for n in kv_lengths]
        self.calls.append(
            {
                "shard": _shard_name(self.sample),
                "key": key,
                "layer": layer,
                "sample": self.sample,
                "timestep": self.timestep,
                "heads": heads,
                "shape": list(self.tensors[f"{key}.q"].shape),
                "text_tokens": text_tokens,
                "kv_lengths": lengths,
            }
        )


def _shard_name(sample: int) -> str:
    return f"capture-{sample:05d}.safetensors"


def capture(
    handle: SLA2Handle,
    run: Callable[[int], Any],
    folder: str | Path,
    *,
    samples: int,
    config: CaptureConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Captures:
    """Run the model `samples` times with full attention and keep Q, K, V; started again, it goes on
    where it was.

    Args:
        handle: of the model that run() runs.
        run: run(i) runs the transformer once or many times (a whole pipeline), with everything
            random drawn from i.
        folder: gets one shard per sample and an index, which lists only finished shards.
        samples: run() is called for i = 0, ..., samples - 1.
        config: what to keep; None keeps all, up to 4 GiB.
        progress: called as progress(done, samples).

    Raises:
        ValueError: layers, heads or layers_per_sample that the model does not have, no room for one
            sample within max_bytes, a folder that holds captures with other settings or of another
            model, or a run() that did not call the model. OSError: a file cannot be written.
    """
    config = config or CaptureConfig()
    folder = Path(folder)
    layers = handle.layers if config.layers is None else config.layers
    missing = sorted(set(layers) - set(handle.layers))
    if missing:
        raise ValueError(f"layers: expected layers among {list(handle.layers)}, got {missing[0]}")
    folder.mkdir(parents=True, exist_ok=True)
    what = {"config": asdict(config), "model": handle.model_identity()}
    settings = json.loads(json.dumps(what | handle.config.order_geometry()))
    content = {"format_version": 1, "settings": settings, "samples": [], "full": False}
    if (folder / INDEX_NAME).exists():
        found = Captures(folder)
        check_same(folder / INDEX_NAME, {"settings": settings})
        content["samples"], content["full"] = found.samples, found.full
    done = {sample["sample"] for sample in content["samples"]}
    for sample in range(samples):
        if content["full"]:
            break
        if sample not in done:
            record = _one_sample(handle, run, sample, layers, config)
            size = sum(t.numel() * t.element_size() for t in record.tensors.values())
            if sum(s["bytes"] for s in content["samples"]) + size > config.max_bytes:
                if not content["samples"]:
                    raise ValueError(
                        f"max_bytes: expected room for one sample of {size} bytes, got"
                        f" {config.max_bytes}"
                    )
                content["full"] = True
            else:
                write_tensors(folder / _shard_name(sample), record.tensors)
                content["samples"].append({"sample": sample, "bytes": size, "calls": record.calls})
            write_json(folder / INDEX_NAME, content)
        if progress:
            progress(sample + 1, samples)
    return Captures(folder)


def _one_sample(
    handle: SLA2Handle,
    run: Callable[[int], Any],
    sample: int,
    layers: Sequence[int],
    config: CaptureConfig,
) -> _Recorder:
    record = _Recorder(sample, layers, handle.config.num_heads, config)
    hook = handle.transformer.register_forward_pre_hook(record.hook, with_kwargs=True)
    try:
        with torch.no_grad(), handle.recording(record):
            run(sample)
    finally:
        hook.remove()
    if not record.calls:
        raise ValueError(
            f"run: expected run({sample}) to call the transformer more than {record.first} times,"
            " it did not"
        )
    return record


class Recorded:
    """Captured calls in memory, for train_router in place of Captures.

    Args:
        found: the calls. settings: SLA2Config.order_geometry(), of their tokens.
    """

    def __init__(self, found: Sequence[Captured], settings: dict[str, Any]):
        self.found, self.settings, self.name = list(found), settings, "memory"

    @property
    def calls(self) -> list[dict[str, Any]]:
        """{"layer", "sample", "shard", "key"} of each call."""
        return [
            {"layer": c.layer, "sample": c.sample, "shard": "memory", "key": str(i)}
            for i, c in enumerate(self.found)
        ]

    @property
    def layers(self) -> tuple[int, ...]:
        """Which layers there are calls of, ascending."""
        return tuple(sorted({c.layer for c in self.found}))

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(x.numel() * x.element_size() for c in self.found for x in (c.q, c.k, c.v))

    def load(self, call: dict[str, Any], device: torch.device | str = "cpu") -> Captured:
        """One call, a record of `calls`, on a device."""
        found = self.found[int(call["key"])]
        q, k, v = (x.to(device) for x in (found.q, found.k, found.v))
        return dataclasses.replace(found, q=q, k=k, v=v)


@torch.no_grad()
def record(
    attentions: Mapping[int, SLA2Attention], run: Callable[[int], Any], *, samples: int
) -> Recorded:
    """Q, K, V of attention modules in a model of any kind, kept in memory on the CPU; the modules
    compute full attention meanwhile.

    Args:
        attentions: {layer: module}. run: run(i) runs the model once or many times, with everything
            random drawn from i. samples: how many times it is called.

    Raises:
        ValueError: run() did not call the modules.
    """
    if not attentions or samples < 1:
        given = f"{len(attentions)} and {samples}"
        raise ValueError(f"attentions, samples: expected at least one of each, got {given}")
    found: list[Captured] = []
    order = next(iter(attentions.values())).config.order_geometry()
    for sample in range(samples):
        before = len(found)

        def keep(
            layer: int,
            number: int,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            text_tokens: int,
            lengths: Tensor | None,
        ) -> None:
            heads = tuple(range(q.shape[1]))
            q, k, v = (x.detach().to("cpu", copy=True) for x in (q, k, v))
            valid = None if lengths is None else tuple(lengths.tolist())
            tensors = (q, k, v)
            found.append(Captured(layer, number, 0.0, heads, *tensors, text_tokens, valid))

        for layer, attention in attentions.items():
            attention.recorder = functools.partial(keep, layer, sample)
        try:
            run(sample)
        finally:
            for attention in attentions.values():
                attention.recorder = None
        if len(found) == before:
            raise ValueError(f"run: expected run({sample}) to call the attentions, it did not")
    return Recorded(found, json.loads(json.dumps(order)))
