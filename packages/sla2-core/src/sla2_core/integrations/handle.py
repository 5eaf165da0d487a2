"""SLA2Handle: switch, configure, save and load SLA2 on a model it was applied to."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_core import adapter as files
from sla2_core.attention import SLA2Attention
from sla2_core.block_map import BlockMap
from sla2_core.config import CHANGEABLE, SLA2Config
from sla2_core.integrations import lora
from sla2_core.integrations.card import write_card
from sla2_core.integrations.family import Family, class_name
from sla2_core.integrations.processor import SLA2Processor, Switch
from sla2_core.integrations.quantized import check_plain
from sla2_core.integrations.token_order import TokenOrder


class StepCounter:
    """A forward pre-hook that sets `switch.dense_step` during the first `dense_steps` denoising
    steps.

    A step is a new timestep, however often the model runs at it; a timestep above the last one
    starts a new video. In training mode, where timesteps come in any order, no step counts.
    """

    def __init__(self, switch: Switch, dense_steps: int):
        self.switch, self.dense_steps = switch, dense_steps
        self.step = -1
        self.last: float | None = None

    def __call__(
        self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if transformer.training:
            self.switch.dense_step = False
            return
        now = timestep_of(transformer, args, kwargs)
        if self.last is None or now > self.last:
            self.step = 0
        elif now < self.last:
            self.step += 1
        self.last = now
        self.switch.dense_step = self.step < self.dense_steps


def timestep_of(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """The largest `timestep` in the arguments of a call of the transformer's forward, in the
    model's own unit; tokens of a given first frame have 0.
    """
    if "timestep" in kwargs:
        return float(kwargs["timestep"].max())
    place = list(inspect.signature(transformer.forward).parameters).index("timestep")
    return float(args[place].max())


class SLA2Handle:
    """SLA2 on a model: what apply_sla2 returns, to switch, configure, save and load it.

    Attributes:
        transformer: the model, of a diffusers class. family: its Family.
        base_model: id of its weights, or None.
        names: {layer: module name} of the replaced layers.
        dense_steps: denoising steps that run with full attention first.
    """

    def __init__(
        self,
        transformer: nn.Module,
        family: Family,
        names: dict[int, str],
        switch: Switch,
        *,
        dense_steps: int = 0,
        base_model: str | None = None,
    ):
        self.transformer: Any = transformer
        self.family, self.names = family, names
        self.base_model, self.dense_steps = base_model, dense_steps
        self._switch = switch
        self._hooks = (
            family.install_hooks(transformer, tuple(names.values())) if family.install_hooks else []
        )
        if dense_steps:  # before the token order, which asks whether this step is dense
            counter = StepCounter(switch, dense_steps)
            self._hooks.append(transformer.register_forward_pre_hook(counter, with_kwargs=True))
        order = next(iter(self.attentions.values())).order
        if not order.identity:
            self._hooks += TokenOrder(transformer, family, order, switch).hooks

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the replaced layers, ascending, counted among the self-attention layers."""
        return tuple(self.names)

    @property
    def processors(self) -> dict[int, SLA2Processor]:
        """{layer: processor}. Raises ValueError naming the first layer that has another one now."""
        found = {
            i: self.transformer.get_submodule(name).processor for i, name in self.names.items()
        }
        for layer, processor in found.items():
            if not isinstance(
                processor, SLA2Processor
            ):  # as CogVideoX's fuse_qkv_projections leaves it
                raise ValueError(
                    f"transformer: expected SLA2's processor at {self.names[layer]}, got"
                    f" {type(processor).__name__}, set after apply_sla2; fuse projections and set"
                    " processors before it"
                )
        return found

    @property
    def attentions(self) -> dict[int, SLA2Attention]:
        """{layer: SLA2Attention}: the modules with the trained parameters."""
        return {i: processor.attention for i, processor in self.processors.items()}

    @property
    def config(self) -> SLA2Config:
        """The configuration in force, the same for all layers."""
        return next(iter(self.attentions.values())).config

    @property
    def enabled(self) -> bool:
        """Whether the replaced layers go through SLA2; see enable() and disable()."""
        return self._switch.enabled

    def enable(self) -> None:
        """Route the self-attention of the replaced layers through SLA2."""
        self._switch.enabled = True

    def disable(self) -> None:
        """Run full attention by the model's own processors, with the same weights."""
        self._switch.enabled = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Full attention inside a with block."""
        before, self._switch.enabled = self._switch.enabled, False
        try:
            yield
        finally:
            self._switch.enabled = before

    def remove(self) -> None:
        """Put the model's own processors back; the handle is of no use afterwards."""
        for name, processor in zip(self.names.values(), self.processors.values()):
            self.transformer.get_submodule(name).set_processor(processor.original)
        for hook in self._hooks:
            hook.remove()
        self.names = {}

    def configure(self, **changes: Any) -> None:
        """Change settings of every layer: topk, precision, backend, qat_backward, tau, or options
        that the members call adjustable.

        Raises ValueError naming the field for one that fixes the shape or the meaning of a trained
        parameter, or for a value outside its range.
        """
        config = self.config.changed(**changes)
        for attention in self.attentions.values():
            attention.config = config

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by group: router, alpha, proj (of SLA), groups of other members, and model
        (everything that is not SLA2's).
        """
        groups: dict[str, list[nn.Parameter]] = {"router": [], "alpha": [], "proj": []}
        for attention in self.attentions.values():
            for group, found in attention.groups().items():
                groups.setdefault(group, []).extend(found)
        own = {id(p) for group in groups.values() for p in group}
        groups["model"] = [p for p in self.transformer.parameters() if id(p) not in own]
        return groups

    def trained_in(self, stage: str) -> list[nn.Parameter]:
        """SLA2's own parameters that a stage trains, "stage1" or "stage2"."""
        members = (m for a in self.attentions.values() for m in a.members().values())
        return [p for member in members if stage in member.stages for p in member.parameters()]

    def adapter_tensors(self) -> dict[str, Tensor]:
        """SLA2's own tensors by "layers.<i>.<name>": the parameters themselves, no copies."""
        return {
            f"layers.{i}.{name}": value
            for i, attention in self.attentions.items()
            for name, value in attention.state_dict(keep_vars=True).items()
        }

    def model_tensors(self) -> dict[str, Tensor]:
        """The transformer's own tensors by "model.<name>": the parameters and buffers themselves,
        no copies. Those of a LoRA that is loaded are left out.
        """
        state = self.transformer.state_dict(keep_vars=True)
        return {f"model.{name}": state[own] for name, own in self._model_names().items()}

    def _model_names(self) -> dict[str, str]:
        """{name of a tensor of the model: its name in the state_dict, inside a LoRA's layer}."""
        prefixes = tuple(f"{name}.processor." for name in self.names.values())
        names = lora.plain_names(self.transformer).items()
        return {plain: own for own, plain in names if plain and not own.startswith(prefixes)}

    def model_identity(self) -> dict[str, Any]:
        """{"class", "config"} of the transformer, its public configuration as JSON values: what an
        adapter is bound to.
        """
        config = {k: v for k, v in dict(self.transformer.config).items() if not k.startswith("_")}
        return {"class": class_name(self.transformer), "config": _plain(config)}

    def save(
        self,
        folder: str | Path,
        *,
        include_model: bool = False,
        state: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the adapter and its model card; returns the folder.

        Args:
            folder: made if need be.
            include_model: also write the transformer's weights, as fine-tuned in stage 2.
            state: the transformer's whole state_dict, where it was gathered from several processes;
                None takes the handle's own.

        Raises:
            OSError: a file cannot be written; the message names it. ValueError: the model's weights
                are quantised, with include_model.
        """
        model = self.model_tensors() if include_model else {}
        check_plain("include_model", model)
        tensors = self.adapter_tensors() | model
        if state is not None:
            prefixes = {
                f"layers.{i}.": f"{name}.processor.attention." for i, name in self.names.items()
            }
            for short, long in prefixes.items():
                tensors |= {
                    n: state[long + n.removeprefix(short)] for n in tensors if n.startswith(short)
                }
            if include_model:
                own = self._model_names().items()
                tensors |= {f"model.{name}": state[long] for name, long in own}
        adapter = files.Adapter(
            config=self.config,
            layers=self.layers,
            model=self.model_identity(),
            tensors=tensors,
            base_model=self.base_model,
            dense_steps=self.dense_steps,
        )
        found = files.save_adapter(adapter, folder)
        write_card(adapter, found)
        return found

    def load(self, folder: str | Path, *, keep_settings: bool = False) -> None:
        """Load an adapter, in place.

        The transformer's own weights, where the adapter holds them, are rounded to the dtype that
        the model is held in.

        Args:
            folder: as written by save().
            keep_settings: keep the k%, precision, qat_backward and tau in force; False takes the
                adapter's.

        Raises:
            FileNotFoundError, ValueError: no such file, another geometry, other layers, another
                model, weights of the model for one that is quantised, or a key, shape or dtype that
                does not fit. The message names the file; nothing is changed then.
        """
        found = files.load_adapter(folder)
        source = str(Path(folder) / files.CONFIG_NAME)
        files.check_geometry(source, found.config, self.config)
        if found.layers != self.layers:
            raise ValueError(
                f"{source}: expected layers {list(self.layers)} as applied, got"
                f" {list(found.layers)}"
            )
        self._check_model(source, found)
        expected = self.adapter_tensors()
        model = (
            self.model_tensors() if any(name.startswith("model.") for name in found.tensors) else {}
        )
        check_plain(f"{source}, which holds the model's weights too", model)
        weights = {
            name: _in_dtype_of(found.tensors.get(name), value) for name, value in model.items()
        }
        files.check_tensors(
            str(Path(folder) / files.WEIGHTS_NAME), found.tensors, expected | weights
        )
        expected |= model
        files.copy_tensors(found.tensors, expected)
        if not keep_settings:
            kept = [name for name in CHANGEABLE if name != "backend"]
            changes = {name: getattr(found.config, name) for name in kept}
            members = found.config.members().values()
            options = {n: found.config.options[n] for m in members for n in m.adjustable}
            self.configure(**changes, options=options)

    def _check_model(self, source: str, found: files.Adapter) -> None:
        own = self.model_identity()
        if found.model.get("class") != own["class"]:
            raise ValueError(
                f"{source}: expected an adapter of {own['class']}, got one of"
                f" {found.model.get('class')}"
            )
        other = found.model.get("config", {})
        for key in sorted(set(own["config"]) | set(other)):
            mine, theirs = own["config"].get(key), other.get(key)
            if key in own["config"] and key in other and mine != theirs:
                raise ValueError(
                    f"{source}: expected an adapter of a model with {key}={mine}, got {theirs}"
                )
        if self.base_model and found.base_model and self.base_model != found.base_model:
            raise ValueError(
                f"{source}: expected an adapter of {self.base_model}, got one of {found.base_model}"
            )

    @contextlib.contextmanager
    def recording(self, recorder: Callable[..., None]) -> Iterator[None]:
        """Run full attention inside a with block, and call recorder(layer, q, k, v, text_tokens,
        kv_lengths) at every layer; see processor.Switch for what it gets.
        """
        before, self._switch.recorder = self._switch.recorder, recorder
        try:
            with self.disabled():
                yield
        finally:
            self._switch.recorder = before

    @contextlib.contextmanager
    def observing(self, observer: Callable[[int, BlockMap], None]) -> Iterator[None]:
        """Call observer(layer, block_map) at every routed call inside a with block. Blocks are of
        tokens in the configuration's token order.
        """
        before, self._switch.observer = self._switch.observer, observer
        try:
            yield
        finally:
            self._switch.observer = before

    def block_maps(self, run: Callable[[], Any]) -> dict[int, BlockMap]:
        """{layer: BlockMap} of each layer's last routed call while run() runs the model, as
        observing() has them.
        """
        maps: dict[int, BlockMap] = {}
        with self.observing(maps.__setitem__):
            run()
        return maps

    def dense_copy(self) -> nn.Module:
        """A frozen copy of the transformer with its own processors: the teacher of
        loss="distill".
        """
        twin = copy.deepcopy(self.transformer)
        for name in self.names.values():
            attn = twin.get_submodule(name)
            attn.set_processor(attn.processor.original)
        for module in twin.modules():  # the twin's copies of them: those of a user stay
            for hook in self._hooks:
                module._forward_pre_hooks.pop(hook.id, None)
                module._forward_hooks.pop(hook.id, None)
        return twin.eval().requires_grad_(False)


def _in_dtype_of(found: Tensor | None, value: Tensor) -> Tensor:
    """What is expected of `found` where `value` will hold it: its shape, and any floating dtype if
    it has one itself.
    """
    if found is None or not (found.is_floating_point() and value.is_floating_point()):
        return value
    return torch.empty_like(value, dtype=found.dtype, device="meta")


def _plain(value: Any) -> Any:
    """`value` as JSON would give it back: tuples become lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
