"""What a merging method is, and those from weights alone."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, final, runtime_checkable

import torch
from torch import Tensor

from lightning_merge.functional.average import average
from lightning_merge.functional.parallel import in_order_on_cores
from lightning_merge.functional.task_arithmetic import task_vectors_of
from lightning_merge.methods.low_rank import low_rank_factors
from lightning_merge.methods.rules import (
    Coefficient,
    check_patterns,
    check_rules,
    coefficients_of,
    matches,
    warn_of_idle,
)
from lightning_merge.methods.unmoved import listed_again, unmoved
from lightning_merge.methods.walk import (
    BlockMerge,
    LinearMerge,
    RowMerge,
    SettledMerge,
    integers,
    map_blocks,
    map_linear,
    parameter_rows,
    scaled,
    stack_parameter,
)
from lightning_merge.methods.widened import Widened, widened
from lightning_merge.states import (
    STATISTIC_SUFFIXES,
    StateDict,
    check_compatible,
    check_finite,
    kind_of,
    shape_of,
    tied_names,
)

Treatment: TypeAlias = Literal["method", "average", "base"]


@runtime_checkable
class TaskVectorReader(Protocol):
    """What :meth:`WeightMethod.task_vector_reader` gives."""

    def __call__(self, part: slice, room: Tensor | None = None) -> Tensor:
        """The entries of one slice."""


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):  # noqa: B024 (the two kinds take different arguments)
    """A recipe that makes one state dict from a base and its experts.

    A method is a frozen dataclass of hyper-parameters. Its inputs are never changed, and what it
    returns shares no memory with them.
    """


@dataclass(frozen=True, kw_only=True)
class WeightMethod(MergeMethod):
    """A method that needs nothing but weights, one parameter at a time."""

    side_by_side: ClassVar[bool] = False
    """Whether parameters are merged at the same time, one core each: where a parameter is one
    decomposition, which gains little from several cores."""

    include: tuple[str, ...] = ("*",)
    """Shell patterns of the parameters that the method merges."""

    exclude: tuple[str, ...] = ()
    """Shell patterns of parameters that it leaves out, even if they are included."""

    otherwise: Literal["average", "base"] = "average"
    """What the parameters left out get: the experts' average, or the base's value."""

    coefficients: tuple[Coefficient, ...] = ()
    """Factors of the task vectors by layer, block or task; the first rule that matches counts."""

    buffers: tuple[str, ...] = ()
    """Shell patterns of floating buffers: averaged, as running_mean and running_var always are.
    A merge of modules adds all that they have."""

    precision: Literal["float32", "float64"] = "float32"
    """Least precision of the work; the result is rounded once, to the base's dtype. Matrices are
    decomposed in float64 in any case."""

    on_buffer_mismatch: Literal["base", "first", "error"] = "base"
    """Integer and boolean buffers that differ: the base's, the first expert's, or an error."""

    def merge(self, base: StateDict, experts: Mapping[str, StateDict]) -> dict[str, Tensor]:
        """Merge the experts into one state dict with the base's keys, shapes and dtypes.

        Walks the parameters in the base's order and holds one parameter of all experts at a time,
        so lazily read mappings stream. Every entry is treated as :meth:`treatment` says; names
        that share one tensor are merged once and share one tensor in the result.

        Args:
            base: The pre-trained weights.
            experts: Fine-tuned weights by task, in the caller's order.

        Raises:
            ValueError: If keys or shapes differ from the base's, a value is not finite, or a rule
                or pattern matches no parameter; the message names the expert and the parameter.
        """
        return dict(self.stream(base, experts))

    def stream(
        self, base: StateDict, experts: Mapping[str, StateDict]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what :meth:`merge` returns, one named tensor after the other."""
        check_compatible(base, experts)
        self.check_names(tuple(base), tuple(experts))
        for message in unmoved(tuple(experts), listed_again(base, experts)) if base else ():
            warnings.warn(message, stacklevel=3)
        is_wide = self.precision == "float64"
        seen = {task: Widened(expert) for task, expert in experts.items()} if is_wide else experts
        method = self.bind(Widened(base) if is_wide else base, seen)
        ties = tied_names(base)
        own = [name for name in base if name not in ties]

        def entry(name: str) -> Tensor:
            value = base[name]
            if not is_wide:
                return method._merge_entry(name, value, seen)
            return method._merge_entry(name, widened(value), seen).to(value.dtype)

        sizes = [math.prod(shape_of(base, name)) for name in own] if self.side_by_side else []
        merges = in_order_on_cores(entry, own, sizes) if sizes else map(entry, own)
        shared: dict[str, Tensor] = {}
        for name in base:
            if name in ties:
                yield name, shared[ties[name]]
                continue
            merged = next(merges)
            if name in ties.values():
                shared[name] = merged
            yield name, merged

    def check_names(self, names: Sequence[str], tasks: Sequence[str]) -> None:
        """Check that every pattern matches a parameter, and every task is an expert.

        Args:
            names: Those of the base.
            tasks: Those of the experts.

        Raises:
            ValueError: If one does not. A pattern that excludes nothing is a warning.
        """
        check_rules(tasks, names, self.coefficients)
        check_patterns(names, self.patterns())
        warn_of_idle(names, self.exclude)

    def patterns(self) -> dict[str, Sequence[str]]:
        """Patterns of names by option, each of which must match."""
        return {"include": self.include, "buffers": self.buffers}

    def treatment(self, name: str, kind: str) -> Treatment:
        """What an entry gets: the method, the average, or the base's value.

        Integer and boolean buffers are the base's (``on_buffer_mismatch`` looks at their values).
        Running statistics, and what ``buffers`` names, are averaged and never extrapolated, so
        that variances stay non-negative. Of the rest, what ``include`` and ``exclude`` select
        goes through the method.

        Args:
            name: The entry's name.
            kind: ``"floating"`` or ``"integer"``, see :func:`lightning_merge.states.kind_of`.
        """
        if kind != "floating":
            return "base"
        if name.rpartition(".")[2] in STATISTIC_SUFFIXES or matches(name, self.buffers):
            return "average"
        chosen = matches(name, self.include) and not matches(name, self.exclude)
        return "method" if chosen else self.otherwise

    def takes_mean(self, name: str, shape: tuple[int, ...], num_experts: int) -> bool:
        """Whether a parameter gets the mean of the task vectors, being no matrix to the method."""
        return False

    def bind(self, base: StateDict, experts: Mapping[str, StateDict]) -> "WeightMethod":
        """Return the method to walk with, after whatever it must know of the whole model.

        Most methods need nothing and return themselves; one with a threshold over the whole task
        vector returns a method that holds the thresholds.
        """
        return self

    @abstractmethod
    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        """Merge one floating-point parameter.

        Args:
            name: Its name in the state dict.
            base: Its pre-trained value, of any shape.
            experts: Its fine-tuned values, of shape ``(T, *base.shape)``.

        Returns:
            The merged value, with the base's shape and dtype.
        """

    def method_names(self, base: StateDict) -> list[str]:
        """Names of the parameters that go through the method, in the base's order, ties once."""
        ties = tied_names(base)
        return [
            name
            for name in base
            if name not in ties and self.treatment(name, kind_of(base, name)) == "method"
        ]

    def task_vectors(self, name: str, base: StateDict, experts: Mapping[str, StateDict]) -> Tensor:
        """Task vectors of one parameter, of shape ``(T, *shape)``, with the coefficients applied.

        In float32 or wider, and bit for bit what :meth:`merge_tensor` computes from its arguments.
        """
        factors = coefficients_of(name, tuple(experts), self.coefficients)
        value = base[name].detach()
        return task_vectors_of(value, stack_parameter(name, value, experts, factors))

    def task_vector_reader(
        self, name: str, base: StateDict, task: str, expert: StateDict
    ) -> TaskVectorReader:
        """What reads a slice of one task vector of one parameter, flat; from several threads.

        The entries are bit for bit those of :meth:`task_vectors`. They lie in the tensor that is
        given as room, if it is one of float32 on their device and long enough, or in a new one.
        """
        origin = base[name].detach().reshape(-1)
        value = expert[name].detach().reshape(-1)
        factors = coefficients_of(name, (task,), self.coefficients)
        plain = value.dtype == origin.dtype == torch.float32 and factors == (1.0,)

        def read(part: slice, room: Tensor | None = None) -> Tensor:
            here, there = origin[part], value[part].to(origin.device)
            if not plain:
                vector = task_vectors_of(here, scaled(here, there[None], factors))[0]
            elif room is None or room.device != here.device or len(room) < len(here):
                vector = torch.sub(there, here)
            else:
                vector = torch.sub(there, here, out=room[: len(here)])
            if not math.isfinite(float(vector.sum())):
                check_finite(name, "the base", base[name])
                check_finite(name, f"expert '{task}'", expert[name])
            return vector

        return read

    def linear_merge(self, name: str) -> LinearMerge | None:
        """What merges one parameter as a linear combination, where a method is one."""
        return None

    def merge_in_blocks(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[str, StateDict],
        coefficients: Sequence[float],
    ) -> Tensor | None:
        """Merge one parameter block by block, without stacking, where a method can do that.

        Args:
            name: As in :meth:`merge_tensor`, like ``base``.
            base: Its pre-trained value.
            experts: State dicts of the experts.
            coefficients: Of the task vectors, one per expert.

        Returns:
            What :meth:`merge_tensor` gives, or None: only that can do it.

        Raises:
            ValueError: If a value is not finite.
        """
        return None

    def merge_low_rank(
        self, name: str, base: Tensor, ups: Sequence[Tensor], downs: Sequence[Tensor]
    ) -> Tensor | None:
        """Merge one parameter from the factors of its task vectors, where a method can do that.

        Args:
            name: As in :meth:`merge_tensor`, like ``base``.
            base: Its pre-trained value.
            ups: Left factors ``(out, rank)``; the rank is each expert's own and may be 0.
            downs: Right factors ``(rank, in)``; a kernel is the matrix ``(out, in * kh * kw)``.

        Returns:
            What :meth:`merge_tensor` makes of the products, or None: only that can do it.
        """
        return None

    def row_merge(self, name: str) -> RowMerge | None:
        """What merges one parameter of experts that come one by one, where a method can do that.

        It gives what :meth:`merge_tensor` gives, and holds a few matrices instead of T of them.
        """
        return None

    def average_tensor(self, experts: Tensor) -> Tensor:
        """Average of ``(T, *shape)`` for entries that the method does not merge."""
        return average(experts, torch.ones(len(experts), dtype=torch.float64))

    def common_options(self) -> dict[str, Any]:
        """The options that every weight method has, to hand on to another one."""
        return {field.name: getattr(self, field.name) for field in fields(WeightMethod)}

    def bound_to(self, function: Callable[[str, Tensor, Tensor], Tensor]) -> "WeightMethod":
        """This method with another :meth:`merge_tensor`: one that knows the whole model."""
        return _Bound(**self.common_options(), function=function)

    def bound_to_blocks(
        self, merger: Callable[[str], BlockMerge], *, on_cores: bool
    ) -> "WeightMethod":
        """This method, walking by blocks with what ``merger`` gives for each parameter's name.

        The merger's checks must find NaN and infinity where they can get lost in a merge; for
        ``on_cores`` see :func:`lightning_merge.methods.walk.map_blocks`.
        """
        return _BoundToBlocks(**self.common_options(), merger=merger, on_cores=on_cores)

    def _merge_entry(self, name: str, value: Tensor, experts: Mapping[str, StateDict]) -> Tensor:
        value = value.detach()
        treatment = self.treatment(name, "floating" if value.is_floating_point() else "integer")
        if treatment == "base":
            check_finite(name, "the base", value)
            if value.is_floating_point():
                return value.clone()
            return integers(name, value, experts, self.on_buffer_mismatch)
        if treatment == "average":
            stacked = stack_parameter(name, value, experts, [1.0] * len(experts))
            return self.average_tensor(stacked).to(value.dtype)
        factors = coefficients_of(name, tuple(experts), self.coefficients)
        low_rank = low_rank_factors(name, value, experts, factors)
        if low_rank is not None:
            merged = self.merge_low_rank(name, value, *low_rank)
            if merged is not None:
                return merged
        linear = self.linear_merge(name)
        if linear is not None:
            return map_linear(linear, name, value, experts, factors)
        merged = self.merge_in_blocks(name, value, experts, factors)
        if merged is not None:
            return merged
        row_merge = self.row_merge(name)
        if row_merge is not None:
            return row_merge(name, value, parameter_rows(name, value, experts, factors))
        return self.merge_tensor(name, value, stack_parameter(name, value, experts, factors))


@final
@dataclass(frozen=True, kw_only=True)
class _Bound(WeightMethod):
    """What :meth:`WeightMethod.bound_to` gives."""

    function: Callable[[str, Tensor, Tensor], Tensor]

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        return self.function(name, base, experts)


@final
@dataclass(frozen=True, kw_only=True)
class _BoundToBlocks(WeightMethod):
    """What :meth:`WeightMethod.bound_to_blocks` gives."""

    merger: Callable[[str], BlockMerge]
    on_cores: bool

    def merge_tensor(self, name: str, base: Tensor, experts: Tensor) -> Tensor:
        rows = list(experts.reshape(len(experts), -1))
        merge = self.merger(name)
        merged = merge(name, 0, base.reshape(-1), rows)
        if isinstance(merge, SettledMerge):
            merge.settle(merged)
        return merged.view(base.shape)

    def merge_in_blocks(
        self,
        name: str,
        base: Tensor,
        experts: Mapping[str, StateDict],
        coefficients: Sequence[float],
    ) -> Tensor:
        merge = self.merger(name)
        return map_blocks(merge, name, base, experts, coefficients, on_cores=self.on_cores)
