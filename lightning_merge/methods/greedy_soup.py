"""GreedySoup: average the experts that help, best first."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.functional.soup import agreement, greedy_members, mean_with
from lightning_merge.functional.spread import evenly_spread
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.outcome import Outcome, PlannedTreatment, as_plain
from lightning_merge.methods.parts import check_finite_inputs, check_inputs
from lightning_merge.networks import (
    call_network,
    get_submodule,
    load_backbone,
    logits_of,
    plain_copy,
    set_submodule,
)
from lightning_merge.runtime import Runtime
from lightning_merge.states import (
    StateDict,
    check_compatible,
    check_finite,
    kind_of,
    tied_names,
)

Score: TypeAlias = Callable[[StateDict], float]
"""How good a backbone is, higher is better; every process must find the same."""


@dataclass(frozen=True, kw_only=True)
class Soup:
    """A greedy soup and how it came to be."""

    state: dict[str, Tensor]
    """The merged backbone."""
    members: list[str]
    """Tasks whose experts are in it, in the order they were added."""
    scores: dict[str, float]
    """Score of every expert alone."""
    trace: list[tuple[str, float, bool]] = field(default_factory=list)
    """Every trial: the expert, the score of the soup with it, and whether it was added."""

    @property
    def score(self) -> float:
        """Score of the soup; never below that of the best expert."""
        return max(score for _, score, added in self.trace if added)


@final
@dataclass(frozen=True, kw_only=True)
class GreedySoup(CalibratedMethod):
    """Averages experts greedily: best first, each that does not lower the soup's score.

    The score needs no labels: how often a backbone, with a task's head, agrees with the task's own
    expert on its calibration inputs, averaged over the tasks. Any other score is for Python:
    :meth:`soup`.
    """

    samples: int = 1000
    """Calibration inputs of each task that count, spread evenly over those there are."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, found {self.samples}.")

    def merge(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> dict[str, Tensor]:
        """Merge the experts by the label-free score; :meth:`soup` also tells what was tried.

        Raises:
            ValueError: If base and experts do not fit, or calibration inputs of a task are missing
                or not finite.
        """
        return self.outcome(base, experts, calibration).state

    def outcome(
        self, base: StateDict, experts: Mapping[str, StateDict], calibration: Calibration
    ) -> Outcome:
        """Merge as :meth:`merge` does, and tell the members, and every trial with its score."""
        check_compatible(base, experts)
        soup = self.soup(base, experts, self.score(tuple(experts), calibration))
        trace = [
            {"expert": task, "score": score, "added": added} for task, score, added in soup.trace
        ]
        found = {"members": soup.members, "score": soup.score, "scores": soup.scores}
        kept = [name for name in base if kind_of(base, name) == "integer"]
        return Outcome(
            state=soup.state,
            found=as_plain({**found, "trace": trace}),
            treatments=dict.fromkeys(kept, "base"),
        )

    def known_treatment(self, name: str, shape: tuple[int, ...], kind: str) -> PlannedTreatment:
        """Integers are the base's; which experts the others are averaged over, the data tells."""
        return "base" if kind == "integer" else "unknown"

    def soup(self, base: StateDict, experts: Mapping[str, StateDict], score: Score) -> Soup:
        """Make the soup under any score.

        The running sum is kept in float64; integer buffers are the base's. One expert is read at a
        time.

        Args:
            base: The pre-trained weights; they give dtypes and integer buffers alone.
            experts: Fine-tuned weights by task; of experts with equal scores the first goes first.
            score: Called with whole backbones, twice the number of experts less one times.

        Raises:
            ValueError: If base and experts do not fit, a value is not finite, or a score is NaN.
        """
        check_compatible(base, experts)
        running: dict[str, Tensor] = {}
        counted: list[str] = []

        def sum_of(members: Sequence[str]) -> dict[str, Tensor]:
            for task in members[len(counted) :]:
                for name, value in _floats(base, task, experts[task]):
                    running[name] = running[name] + value if name in running else value.double()
                counted.append(task)
            return running

        def average(members: Sequence[str], one: str) -> dict[str, Tensor]:
            sums = sum_of(members)
            added = _floats(base, one, experts[one])
            return _filled(base, {n: mean_with(sums[n], len(members), v) for n, v in added})

        def checked(state: StateDict, what: str) -> float:
            found = float(score(state))
            if found != found:
                raise ValueError(f"the score of {what} is NaN: scores must be comparable numbers.")
            return found

        alone = {
            t: checked(_filled(base, dict(_floats(base, t, e))), t) for t, e in experts.items()
        }
        members, trace = greedy_members(
            alone,
            lambda members, one: checked(average(members, one), f"{', '.join(members)} and {one}"),
        )
        mean = {name: value / len(members) for name, value in sum_of(members).items()}
        return Soup(state=_filled(base, mean), members=members, scores=alone, trace=trace)

    def score(self, tasks: Sequence[str], calibration: Calibration) -> Score:
        """The label-free score: mean agreement with each task's own expert.

        Batch-norm statistics of a network with such layers are estimated anew for every backbone,
        as the finished merge has them.

        Args:
            tasks: Tasks that count.
            calibration: Networks, inputs and processes.

        Raises:
            ValueError: If calibration inputs of a task are missing or not finite, or a network's
                class scores on them are not: here for an expert, in the score for a soup.
        """
        check_inputs(dict.fromkeys(tasks), calibration.inputs, "GreedySoup")
        runtime, inputs = calibration.runtime, calibration.inputs
        rows = {task: evenly_spread(len(inputs[task]), self.samples) for task in tasks}
        for task in tasks:
            check_finite_inputs(task, inputs[task], rows[task], calibration.batch_size)
        shares = {t: list(runtime.share(rows[t].split(calibration.batch_size))) for t in tasks}
        working = plain_copy(calibration.network(tasks[0])).eval()
        heads, answers = {}, {}
        for task in tasks:
            expert = plain_copy(calibration.network(task)).eval()
            heads[task] = get_submodule(expert, calibration.head)
            answers[task] = [_answer(expert, calibration, task, part) for part in shares[task]]
            _check_scores(task, "its expert", sum(map(_undefined, answers[task])), runtime)

        def of(state: StateDict) -> float:
            load_backbone(working, state, calibration.head)
            used = {task: inputs[task] for task in tasks}
            reestimate_batch_norm(
                working, calibration.head, used, runtime, batch_size=calibration.batch_size
            )
            found = torch.zeros(len(tasks), dtype=torch.float64, device=runtime.device)
            for index, task in enumerate(tasks):
                set_submodule(working, calibration.head, heads[task])
                undefined = 0
                for part, theirs in zip(shares[task], answers[task], strict=True):
                    ours = _answer(working, calibration, task, part)
                    undefined += _undefined(ours)
                    found[index] += agreement(ours, theirs)
                _check_scores(task, "a soup", undefined, runtime)
            sizes = [len(rows[task]) for task in tasks]
            return float((runtime.reduce(found).cpu() / torch.tensor(sizes)).mean())

        return of


def _answer(network: nn.Module, calibration: Calibration, task: str, rows: Tensor) -> Tensor:
    batch = calibration.runtime.to_device(calibration.inputs[task].take(rows))
    with torch.inference_mode(), calibration.runtime.precision():
        return logits_of(call_network(network, batch)).float()


def _undefined(scores: Tensor) -> int:
    """Samples without a best class; minus infinity is a class that is ruled out."""
    return int((~(scores < math.inf)).any(1).sum())


def _check_scores(task: str, whose: str, undefined: int, runtime: Runtime) -> None:
    # summed over the processes: all of them end, or none does
    total = int(runtime.reduce(torch.tensor(float(undefined), device=runtime.device)))
    if total:
        raise ValueError(
            f"'{task}': the class scores of {whose} hold NaN or infinity in {total} calibration "
            "samples. Check the inputs and the weights, or use a wider precision."
        )


def _floats(base: StateDict, task: str, expert: StateDict) -> list[tuple[str, Tensor]]:
    found = []
    for name in base:
        if kind_of(base, name) == "floating":
            value = expert[name].detach()
            check_finite(name, f"expert '{task}'", value)
            found.append((name, value))
    return found


def _filled(base: StateDict, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ties = tied_names(base)
    found: dict[str, Tensor] = {}
    for name in base:
        if name not in ties:
            like = base[name].detach()
            found[name] = values.get(name, like).to(like.device, like.dtype, copy=True)
    return {name: found[ties.get(name, name)] for name in base}
