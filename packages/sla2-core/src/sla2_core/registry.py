"""The axes of the operator: what a member of an axis is, and the registers that know them by name.

O = mix(sparse(Q, K, V; blocks(router), format), complement(Q, K, V; the other blocks)), over tokens
in an order. Each axis is a folder with one member a file; a member registers itself by its name:

    @ROUTERS.register("learned")
    class LearnedRouter(Router): ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

STAGES = ("stage1", "stage2")
Heads = Sequence[int] | slice | None  # which of a module's heads a call is about; None: all


class Described:
    """What the rest of the package asks of a member's class.

    Attributes:
        name: the name it is registered under.
        settings: fields of SLA2Config that this member reads and that fix the shape or the meaning
            of its parameters; an adapter is bound to their values.
        initial: fields of SLA2Config that only set where training starts.
        options: {name: default} of settings of its own, given as SLA2Config(options={name: value}).
        adjustable: those options that may change after training; an adapter is bound to the others.
    """

    name: ClassVar[str] = ""
    settings: ClassVar[tuple[str, ...]] = ()
    initial: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {}
    adjustable: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Raises ValueError, `options.NAME: ...`, for a value that the type of its default does not
        rule out. A default of None rules out none.
        """


class Member(Described, nn.Module):
    """A member that may have parameters. They are fp32, and stay so under `.to(bfloat16)` and
    `.half()`; `.double()` and devices go through.

    Attributes:
        group: the parameter group it belongs to: "router", "alpha", "proj", or a new one.
        stages: the stages of training in which its parameters are trained. Outside of stage 1,
            those of a member that stage 2 leaves alone do not require a gradient.
        per_topk: whether stage 1 trains one copy for each k% (True), or one for all of them.
    """

    group: ClassVar[str] = "other"
    stages: ClassVar[tuple[str, ...]] = STAGES
    per_topk: ClassVar[bool] = False

    def add_parameter(self, name: str, start: Tensor) -> None:
        """Make the parameter `name` in fp32 on torch's default device; see make_parameters. It
        requires a gradient if stage 2 trains this member.
        """
        device = torch.get_default_device()
        value = nn.Parameter(start.to(device=device, dtype=torch.float32), "stage2" in self.stages)
        self.register_parameter(name, value)

    def start(self) -> Mapping[str, Tensor]:
        """Initial values of the parameters by name, fp32 on the CPU."""
        return {}

    def make_parameters(self) -> None:
        """Make the parameters that start() names; a member's constructor ends with this."""
        for name, value in self._initial().items():
            self.add_parameter(name, value)

    def reset_parameters(self) -> None:
        """Put the initial values back, for instance after a module was made on the meta device."""
        with torch.no_grad():
            for name, value in self._initial().items():
                getattr(self, name).copy_(value)

    def _initial(self) -> Mapping[str, Tensor]:
        """start() in fp32 on the CPU, whatever torch's defaults are."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return self.start()
        finally:
            torch.set_default_dtype(before)

    def configure(self, config: Any) -> None:
        """Take over what may change of a configuration, see config.CHANGEABLE."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            if t.dtype.is_floating_point and out.dtype in (torch.bfloat16, torch.float16):
                return t.to(out.device)
            return out

        return super()._apply(keep, recurse)


def of_heads(value: Tensor, heads: Heads) -> Tensor:
    """A parameter (H, ...) for some heads. One of (1, ...) comes back whole: the heads share it.

    16-bit parameters, which FSDP2's mixed precision makes, come back in fp32.
    """
    if value.dtype in (torch.bfloat16, torch.float16):
        value = value.float()
    return value if heads is None or value.shape[0] == 1 else value[heads]


M = TypeVar("M", bound=Described)


class Axis(Generic[M]):
    """The members of one axis by name. `field` is the field of SLA2Config that chooses one."""

    def __init__(self, field: str):
        self.field = field
        self.version = 0  # counts the registrations, for what is kept by name
        self._members: dict[str, type[M]] = {}

    def register(self, name: str) -> Callable[[type[M]], type[M]]:
        """A class decorator that registers a member. Raises ValueError for a name that another
        class already has.
        """

        def add(member: type[M]) -> type[M]:
            known = self._members.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (
                member.__module__,
                member.__qualname__,
            ):
                raise ValueError(
                    f"{self.field}: expected a new name, got {name!r} of {known.__qualname__}"
                )
            member.name = name
            self._members[name] = member
            self.version += 1
            return member

        return add

    def names(self) -> tuple[str, ...]:
        """The registered names, in the order of registration."""
        return tuple(self._members)

    def all(self) -> tuple[type[M], ...]:
        """The registered classes, in the order of registration."""
        return tuple(self._members.values())

    def get(self, name: str) -> type[M]:
        """The class of that name. Raises ValueError naming the field and the known names."""
        if not isinstance(name, str) or name not in self._members:
            raise ValueError(
                f"{self.field}: expected one of {', '.join(self._members)}, got {name!r}"
            )
        return self._members[name]

    def make(self, config: Any) -> M:
        """The member that `config` chooses, made for it."""
        return self.get(getattr(config, self.field))(config)  # type: ignore[call-arg]


ORDERS: Axis[Any] = Axis("token_order")
ROUTERS: Axis[Any] = Axis("router")
COMPLEMENTS: Axis[Any] = Axis("complement")
MIXINGS: Axis[Any] = Axis("alpha")
FORMATS: Axis[Any] = Axis("precision")
AXES: tuple[Axis[Any], ...] = (ORDERS, ROUTERS, COMPLEMENTS, MIXINGS, FORMATS)
# Where the operator is computed, by name: backends.register_backend puts them in.
BACKENDS: dict[str, Any] = {}
