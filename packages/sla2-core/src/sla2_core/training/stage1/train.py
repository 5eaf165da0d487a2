"""Stage 1 (Alg. 1): fit the router and alpha to full attention on captured Q, K, V, with SoftTop-k,
by query blocks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sla2_core.adapter import (
    check_tensors,
    copy_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from sla2_core.attend import Parts
from sla2_core.attention import SLA2Attention
from sla2_core.config import SLA2Config
from sla2_core.integrations.family import class_name
from sla2_core.integrations.handle import SLA2Handle
from sla2_core.registry import Member
from sla2_core.training.capture import AnyCaptures, Captured, Captures
from sla2_core.training.settings import check_fields, check_same
from sla2_core.training.stage1.report import layer_report
from sla2_core.training.stage1.soft import calls

STATE_NAME = "stage1.safetensors"
SETTINGS_NAME = "stage1.json"
REPORT_NAME = "report.json"
Progress = Callable[[int, int, dict[str, float]], None]  # progress(step, steps, {"loss": ...})


@dataclass(frozen=True, kw_only=True)
class Stage1Config:
    """Settings of stage 1.

    Args:
        topk: the k% trained together: one router for all, one alpha for each (its target, the
            routed mass, grows with k%).
        steps: optimiser steps; each takes one captured call of every layer at one of the k%, in
            turn.
        rows: query blocks drawn per call and step; None takes all.
        router_lr, alpha_lr: peak learning rates of AdamW, of the router and of everything else
            that stage 1 trains, linearly warmed up over 5 % and decayed to 0.
        eval_every, patience, min_gain: every so many steps the held-out error is measured; training
            ends early when it did not fall by the fraction `min_gain` for `patience` measurements
            in a row.
        holdout: share of the samples held out (at least one, if there are two).
        eval_rows: query blocks per call in measurements and in the report; None takes all.
        max_scores: elements of the largest score matrix; bounds the memory, about 8 fp32 copies of
            it.
        cache_bytes: captures are kept in memory if they are smaller than this.
        checkpoint_every: steps between checkpoints. seed: of every draw.
    """

    topk: tuple[float, ...] = (0.05, 0.04, 0.03)
    steps: int = 300
    rows: int | None = 8
    router_lr: float = 5e-3
    alpha_lr: float = 5e-2
    eval_every: int = 25
    patience: int = 4
    min_gain: float = 1e-3
    holdout: float = 0.2
    eval_rows: int | None = 8
    max_scores: int = 1 << 25
    cache_bytes: int = 1 << 30
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(
            self,
            {
                "fractions in (0, 1]": ("topk",),
                "an integer >= 1": (
                    "steps",
                    "rows",
                    "eval_every",
                    "patience",
                    "eval_rows",
                    "max_scores",
                    "checkpoint_every",
                ),
                "an integer >= 0": ("cache_bytes", "seed"),
                "a number >= 0": ("router_lr", "alpha_lr", "min_gain"),
                "a number in [0, 1)": ("holdout",),
            },
            optional=("rows", "eval_rows"),
        )


@dataclass(kw_only=True)
class Stage1Report:
    """What stage 1 reached.

    Attributes:
        steps: optimiser steps done. stopped_early: whether the held-out error ended them.
        loss: the training error of each step, relative to the mean square of full attention.
        held_out: [step, held-out error] of each measurement.
        layers: {"layer", "topk", "mass", "error", "gain"} for each layer and k%; see
            report.layer_report.
    """

    steps: int = 0
    stopped_early: bool = False
    loss: list[float] = field(default_factory=list)
    held_out: list[list[float]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; Stage1Report(**values) reads them."""
        return asdict(self)


class _Trainee:
    """Copies of one layer's members in training: one of each, or one for each k%, as they say."""

    def __init__(self, attention: SLA2Attention, topk: tuple[float, ...]):
        self.config = attention.config
        members = attention.members()
        self.shared = {n: _learning(m) for n, m in members.items() if not m.per_topk}
        self.own = {k: {n: _learning(m) for n, m in members.items() if m.per_topk} for k in topk}

    def members(self, topk: float) -> dict[str, Any]:
        """The members by name, as they work at one k%."""
        return {**self.shared, **self.own[topk]}

    def tensors(self, layer: int) -> dict[str, nn.Parameter]:
        """What stage 1 trains: "layers.<i>.<member>.<name>", or with the k% before the name."""
        return {
            prefix + name: parameter
            for prefix, member in self._copies(layer).items()
            for name, parameter in member.named_parameters()
            if parameter.requires_grad
        }

    def of_group(self, layer: int, group: str) -> set[str]:
        """The names of those that belong to a parameter group."""
        found = {p for p, member in self._copies(layer).items() if member.group == group}
        return {n for n in self.tensors(layer) if n.startswith(tuple(found))} if found else set()

    def _copies(self, layer: int) -> dict[str, Member]:
        """The copies by the beginning of their tensors' names."""
        found = {f"layers.{layer}.{n}.": m for n, m in self.shared.items()}
        for k, members in self.own.items():
            found |= {f"layers.{layer}.{n}.{k:g}.": m for n, m in members.items()}
        return found

    def error(
        self, captured: Captured, topk: float, rows: Tensor, max_scores: int, learn: bool
    ) -> float:
        """Squared error of the soft operator relative to full attention; with `learn`, gradients
        are added up.
        """
        members = self.members(topk)
        router, parts = members["router"], Parts(members["complement"], members["mixing"])
        # Beside a router that does not learn, the others may see the mask they will work with.
        learnt = any(p.requires_grad for p in router.parameters())
        total, norm = 0.0, None
        for call, share in calls(captured, self.config, len(rows), max_scores):
            scores = call.scores(router, rows)
            if learnt:
                mask = call.soft_mask(router, scores, topk)
            else:
                mask = call.hard_mask(router, scores, topk, rows)
            out, full = call.attend(rows, scores, mask, parts)
            if norm is None:  # of the first chunk: any fixed scale serves
                norm = full.square().mean()
            loss = (out - full).square().mean() / norm * share
            if learn:
                loss.backward()
            total += float(loss.detach())
        return total


def _learning(member: Member) -> Member:
    """A copy whose parameters require a gradient if stage 1 trains them."""
    return copy.deepcopy(member).requires_grad_("stage1" in member.stages)


class _Data:
    """Captured calls by layer, split into training and held-out samples, kept in memory
    if small.
    """

    def __init__(
        self,
        captures: AnyCaptures,
        layers: tuple[int, ...],
        config: Stage1Config,
        device: torch.device,
    ):
        self.captures, self.device = captures, device
        self.memory: dict[str, Captured] | None = (
            {} if captures.bytes <= config.cache_bytes else None
        )
        samples = sorted({call["sample"] for call in captures.calls})
        held = max(1, round(config.holdout * len(samples)))
        held = min(held, len(samples) - 1)  # one is left to learn from; of one sample none is held
        self.held = set(samples[len(samples) - held :]) if held else set(samples)
        learnt = set(samples[: len(samples) - held]) if held else set(samples)
        self.train = {
            i: [c for c in captures.calls if c["layer"] == i and c["sample"] in learnt]
            for i in layers
        }
        self.test = {
            i: [c for c in captures.calls if c["layer"] == i and c["sample"] in self.held]
            for i in layers
        }
        for layer in layers:
            if not self.train[layer]:
                raise ValueError(
                    f"captures: expected calls of layer {layer} in the {len(learnt)} of"
                    f" {len(samples)} samples that are not held out, got none in {captures.name}"
                )
            self.test[layer] = self.test[layer] or self.train[layer][-1:]

    def get(self, call: dict[str, Any]) -> Captured:
        if self.memory is None:
            return self.captures.load(call, self.device)
        key = f"{call['shard']}/{call['key']}"
        if key not in self.memory:
            self.memory[key] = self.captures.load(call, self.device)
        return self.memory[key]


def _rows(rng: np.random.Generator, captured: Captured, block_q: int, count: int | None) -> Tensor:
    t_m = -(-(captured.q.shape[2] - captured.text_tokens) // block_q)
    chosen = (
        np.arange(t_m)
        if count is None or count >= t_m
        else np.sort(rng.choice(t_m, size=count, replace=False))
    )
    return torch.from_numpy(chosen).to(captured.q.device)


def train_router(
    attentions: Mapping[int, SLA2Attention],
    captures: AnyCaptures,
    config: Stage1Config,
    folder: str | Path,
    *,
    progress: Progress | None = None,
) -> Stage1Report:
    """Stage 1 on attention modules, for a model without a handle: train what their members give to
    stage 1 (router and alpha of SLA2), and leave each with the alpha of the k% nearest to its own.

    Args:
        attentions: {layer: module}, all of one configuration; layers as the captures number them.
        captures: of Captures(folder), or record().
        folder: checkpoint, settings and report; a finished run in it is loaded, an unfinished one
            goes on.
        progress: called as progress(step, steps, {"loss": relative squared error}).

    Raises:
        ValueError: captures of other heads, layers, head dimension or token order, modules of
            different configurations, or a folder with other settings.
        FloatingPointError: the loss or the held-out error is not finite; the message names step and
            layer.
    """
    return _train(dict(attentions), captures, config, Path(folder), {}, progress)


def train_stage1(
    handle: SLA2Handle,
    captures: Captures,
    config: Stage1Config,
    folder: str | Path,
    *,
    progress: Progress | None = None,
) -> Stage1Report:
    """train_router for the layers of a handle, which keeps captures of another model out.

    Args:
        handle: of the model the captures came from; its configuration says what there is to learn.
        captures: see capture(). folder, progress: as of train_router.

    Raises:
        As train_router; ValueError for captures of another model.
    """
    if captures.settings["model"] != handle.model_identity():
        raise ValueError(
            f"captures: expected captures of this {class_name(handle.transformer)}, got another"
            " model's"
        )
    model = {"model": handle.model_identity()}
    return _train(handle.attentions, captures, config, Path(folder), model, progress)


def _train(
    attentions: dict[int, SLA2Attention],
    captures: AnyCaptures,
    config: Stage1Config,
    folder: Path,
    model: dict[str, Any],
    progress: Progress | None,
) -> Stage1Report:
    sla2 = _common_config(attentions)
    _check_captures(captures, attentions, sla2)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"config": asdict(config), "sla2": {**sla2.geometry(), **sla2.stage1_settings()}}
    settings = json.loads(json.dumps({**settings, "layers": list(attentions), **model}))
    if (folder / SETTINGS_NAME).exists():
        check_same(folder / SETTINGS_NAME, settings)
    else:
        write_json(folder / SETTINGS_NAME, settings)
    if (folder / REPORT_NAME).exists():
        load_router(attentions, folder)
        return Stage1Report(**read_json(folder / REPORT_NAME))
    trainees = {i: _Trainee(a, config.topk) for i, a in attentions.items()}
    device = next((p.device for a in attentions.values() for p in a.parameters()), None)
    data = _Data(captures, tuple(attentions), config, device or torch.device("cpu"))
    report = _Run(trainees, data, config, folder).train(progress)
    for layer, trainee in trainees.items():
        captured = data.get(data.test[layer][0])
        rng = np.random.default_rng([config.seed, 2])
        rows = _rows(rng, captured, sla2.block_q, config.eval_rows)
        for k in config.topk:
            members = trainee.members(k)
            report.layers.append(
                layer_report(layer, captured, trainee.config, members, k, rows, config.max_scores)
            )
    write_json(folder / REPORT_NAME, report.to_dict())
    load_router(attentions, folder)
    return report


def _common_config(attentions: Mapping[int, SLA2Attention]) -> SLA2Config:
    if not attentions:
        raise ValueError("attentions: expected at least one module, got none")
    configs = [attention.config for attention in attentions.values()]
    if different := [c for c in configs if c != configs[0]]:
        raise ValueError(
            f"attentions: expected modules of one configuration, got {configs[0]} and"
            f" {different[0]}"
        )
    return configs[0]


class _Run:
    """The training loop and its checkpoint."""

    def __init__(
        self, trainees: dict[int, _Trainee], data: _Data, config: Stage1Config, folder: Path
    ):
        self.trainees, self.data, self.config = trainees, data, config
        self.path = folder / STATE_NAME
        self.tensors = {name: p for i, t in trainees.items() for name, p in t.tensors(i).items()}
        of_router = {n for i, t in trainees.items() for n in t.of_group(i, "router")}
        routers = [p for name, p in self.tensors.items() if name in of_router]
        alphas = [p for name, p in self.tensors.items() if name not in of_router]
        groups: list[dict[str, Any]] = [
            {"params": routers, "lr": config.router_lr},
            {"params": alphas, "lr": config.alpha_lr},
        ]
        groups = [group for group in groups if group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0) if groups else None
        self.best = {name: p.detach().clone() for name, p in self.tensors.items()}
        self.step = 0
        self.loss: list[float] = []
        self.held_out: list[tuple[int, float]] = []

    def train(self, progress: Progress | None) -> Stage1Report:
        steps = self.config.steps if self.optimizer else 0
        if self.path.exists():
            self._load()
        while self.step < steps and not self._stalled():
            self.loss.append(self._one_step())
            self.step += 1
            if self.step % self.config.eval_every == 0 or self.step == steps:
                self._measure()
            if self.step % self.config.checkpoint_every == 0:
                self._save()
            if progress:
                progress(self.step, steps, {"loss": self.loss[-1]})
        if self.held_out:
            copy_tensors(self.best, self.tensors)
        self._save()
        return Stage1Report(
            steps=self.step,
            stopped_early=self.step < steps,
            loss=self.loss,
            held_out=[list(x) for x in self.held_out],
        )

    def _one_step(self) -> float:
        assert self.optimizer is not None  # train() takes no step without one
        config, total = self.config, 0.0
        rng = np.random.default_rng([config.seed, 0, self.step])
        topk = config.topk[self.step % len(config.topk)]
        rate = min((self.step + 1) / max(1, config.steps // 20), 1 - self.step / config.steps)
        for group, peak in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = peak * rate
        for layer, trainee in self.trainees.items():
            known = self.data.train[layer]
            captured = self.data.get(known[int(rng.integers(len(known)))])
            rows = _rows(rng, captured, trainee.config.block_q, config.rows)
            error = trainee.error(captured, topk, rows, config.max_scores, learn=True)
            if not np.isfinite(error):
                self._stop(self.step + 1, layer, "loss", error)
            total += error / len(self.trainees)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    @torch.no_grad()
    def _measure(self) -> None:
        config, errors = self.config, []
        for layer, trainee in self.trainees.items():
            captured = self.data.get(self.data.test[layer][0])
            rows = _rows(
                np.random.default_rng([config.seed, 1]),
                captured,
                trainee.config.block_q,
                config.eval_rows,
            )
            found = [
                trainee.error(captured, k, rows, config.max_scores, learn=False)
                for k in config.topk
            ]
            if not np.isfinite(found).all():
                self._stop(self.step, layer, "held-out error", sum(found))
            errors += found
        if not self.held_out or np.mean(errors) < min(e for _, e in self.held_out):
            self.best = {name: p.detach().clone() for name, p in self.tensors.items()}
        self.held_out.append((self.step, float(np.mean(errors))))

    def _stop(self, step: int, layer: int, what: str, value: float) -> None:
        last = self.path if self.path.exists() else "none yet"
        raise FloatingPointError(
            f"step {step}, layer {layer}: the {what} is {value}; the last good checkpoint is {last}"
        )

    def _stalled(self) -> bool:
        errors = [error for _, error in self.held_out]
        last = self.config.patience
        return len(errors) > last and min(errors[-last:]) > min(errors[:-last]) * (
            1 - self.config.min_gain
        )

    def _save(self) -> None:
        state = {name: p.detach() for name, p in self.tensors.items()}
        state |= {f"best.{name}": p for name, p in self.best.items()}
        if self.optimizer:
            for index, values in self.optimizer.state_dict()["state"].items():
                state |= {f"optimizer.{index}.{key}": value for key, value in values.items()}
        state["step"] = torch.tensor(self.step)
        state["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        state["held_out"] = torch.tensor(self.held_out, dtype=torch.float64).reshape(-1, 2)
        write_tensors(self.path, state)

    def _load(self) -> None:
        found = read_tensors(self.path)
        self.step = int(found.pop("step"))
        self.loss = found.pop("loss").tolist()
        self.held_out = [(int(step), error) for step, error in found.pop("held_out").tolist()]
        copy_tensors(found, self.tensors)
        self.best = {name: found[f"best.{name}"].to(p.device) for name, p in self.tensors.items()}
        if self.optimizer is None:
            return
        state = self.optimizer.state_dict()
        for name, value in found.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)


def load_stage1(handle: SLA2Handle, folder: str | Path) -> None:
    """load_router for the layers of a handle: arguments and errors are its own."""
    load_router(handle.attentions, folder)


def load_router(attentions: Mapping[int, SLA2Attention], folder: str | Path) -> None:
    """Put a finished stage 1 into modules: the router, and the alpha of the k% nearest to theirs.

    Args:
        attentions: {layer: module}, all of one configuration. folder: of the finished stage 1.

    Raises:
        FileNotFoundError, ValueError: an unfinished run, another geometry, other members, or other
            layers; the message names the file.
    """
    folder = Path(folder)
    source = folder / STATE_NAME
    settings = read_json(folder / SETTINGS_NAME)
    if not (folder / REPORT_NAME).exists():
        raise FileNotFoundError(f"{folder / REPORT_NAME}: expected a finished stage 1, found none")
    config = _common_config(attentions)
    for name, value in json.loads(json.dumps(config.geometry())).items():
        if settings["sla2"].get(name) != value:
            raise ValueError(
                f"{folder / SETTINGS_NAME}: expected {name}={value!r} as applied, got"
                f" {settings['sla2'].get(name)!r}"
            )
    if settings["layers"] != list(attentions):
        raise ValueError(
            f"{folder / SETTINGS_NAME}: expected layers {list(attentions)}, got"
            f" {settings['layers']}"
        )
    topk = min(settings["config"]["topk"], key=lambda k: (abs(k - config.topk), k))
    expected, names = {}, {}
    for layer, attention in attentions.items():
        for member_name, member in attention.members().items():
            if "stage1" not in member.stages:
                continue
            middle = f"{member_name}.{topk:g}" if member.per_topk else member_name
            for name, parameter in member.named_parameters():
                expected[f"layers.{layer}.{member_name}.{name}"] = parameter
                names[f"layers.{layer}.{middle}.{name}"] = f"layers.{layer}.{member_name}.{name}"
    tensors = read_tensors(source)
    found = {names[name]: value for name, value in tensors.items() if name in names}
    check_tensors(str(source), found, expected)
    copy_tensors(found, expected)


def _check_captures(
    captures: AnyCaptures, attentions: Mapping[int, SLA2Attention], config: SLA2Config
) -> None:
    missing = sorted(set(attentions) - set(captures.layers))
    if missing:
        raise ValueError(
            f"captures: expected calls of layer {missing[0]}, got layers {list(captures.layers)}"
        )
    found = {"token_order": "raster"} | dict(captures.settings)
    for name, value in json.loads(json.dumps(config.order_geometry())).items():
        if found.get(name) != value:
            raise ValueError(
                f"captures: expected tokens ordered with {name}={value!r}, got {found.get(name)!r}"
            )
