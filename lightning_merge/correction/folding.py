"""Linear heads with a correction absorbed, remembered from query to query."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_merge.correction.checks import Head
from lightning_merge.correction.fit import Bias
from lightning_merge.correction.fitted import FittedTasks
from lightning_merge.correction.mixture import HeadRows
from lightning_merge.correction.solver import MixtureSolver


class HeadFolder:
    """Folds heads, and keeps what a next query of the same heads can use.

    Args:
        fitted: The tasks.
        solver: Solves for the rows of the heads.
        memory_cap: Bytes that are kept at most.
    """

    def __init__(self, fitted: FittedTasks, solver: MixtureSolver, memory_cap: int) -> None:
        self._fitted, self._solver, self._memory_cap = fitted, solver, memory_cap
        self._kept: list[HeadRows] = []

    def folded(
        self, preferences: Tensor, heads: Mapping[str, Head], chunk: int, bias: Bias
    ) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Weight (p, K, d) and bias (p, K) by task, for chunks of checked preferences (P, T)."""
        device = next(iter(self._fitted.statistics.values())).device
        wide = {t: H.detach().to(device, torch.float64) for t, (H, _) in heads.items()}
        sizes = [len(H) for H in wide.values()]
        stacked = self._rows(torch.cat(list(wide.values())), sizes)
        stacked.points += len(preferences)
        for part in preferences.split(chunk):
            rows = self._solver.maps(part, stacked).split(sizes, dim=1)
            yield {
                task: self._with_bias(task, found, H, heads[task][1], bias)
                for (task, H), found in zip(wide.items(), rows, strict=True)
            }
        self._keep(stacked)

    def _rows(self, weight: Tensor, sizes: list[int]) -> HeadRows:
        """What is known of these very rows, or nothing yet."""
        for rows in self._kept:
            if rows.sizes == sizes and torch.equal(rows.weight, weight):
                return rows
        return HeadRows(weight, sizes)

    def _keep(self, rows: HeadRows) -> None:
        """Keep what was asked for last, within the memory cap."""
        others = [other for other in self._kept if other is not rows]
        self._kept, used = [], 0
        for known in (rows, *others):
            used += known.memory
            if used <= self._memory_cap:
                self._kept.append(known)

    def _with_bias(
        self, task: str, rows: Tensor, weight: Tensor, bias: Tensor | None, kind: Bias
    ) -> tuple[Tensor, Tensor]:
        offset = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(weight)
        offset = offset.expand(len(rows), -1)
        if kind == "shared":
            return rows[..., :-1], offset + rows[..., -1]
        if kind == "per_task":
            total = self._fitted.fit(task).total
            return rows, offset + weight @ total.mean_expert - rows @ total.mean_merged
        return rows, offset
