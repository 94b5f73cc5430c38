"""What plain torch needs for the same results, parameter by parameter: the attainable speed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from benchmarks.peers import Contender, State


def average(base: State, experts: dict[str, State]) -> State:
    merged = {}
    for name in base:
        first, *rest = (expert[name] for expert in experts.values())
        total = first / len(experts)
        for value in rest:
            total.add_(value, alpha=1 / len(experts))
        merged[name] = total
    return merged


def task_arithmetic(base: State, experts: dict[str, State]) -> State:
    merged = {}
    for name, value in base.items():
        total = value * (1 - 0.3 * len(experts))
        for expert in experts.values():
            total.add_(expert[name], alpha=0.3)
        merged[name] = total
    return merged


def ties(base: State, experts: dict[str, State]) -> State:
    size = sum(value.numel() for value in base.values())
    thresholds = []
    for expert in experts.values():
        flat = torch.cat([(expert[n] - base[n]).abs_().flatten() for n in base])
        thresholds.append(flat.kthvalue(size - int(0.2 * size)).values)
    del flat
    merged = {}
    for name, value in base.items():
        rows = torch.stack([expert[name] - value for expert in experts.values()])
        for row, threshold in zip(rows, thresholds, strict=True):
            row *= row.abs() >= threshold
        sign = rows.sum(0).sign_()
        agree = rows * sign > 0
        merged[name] = value + (rows * agree).sum(0) / agree.sum(0).clamp_(min=1)
    return merged


def _tsv_matrix(base: Tensor, experts: list[Tensor]) -> Tensor:
    wide = base.shape[0] < base.shape[1]
    lefts, values, rights = [], [], []
    for expert in experts:
        update = (expert - base).double()
        update = update.t() if wide else update
        rank = update.shape[1] // len(experts)
        squares, vectors = torch.linalg.eigh(update.t() @ update)
        roots, right = squares[-rank:].sqrt(), vectors[:, -rank:]
        lefts.append(update @ right / roots)
        values.append(roots)
        rights.append(right)
    left, right = (_whitened(torch.cat(sides, 1)) for sides in (lefts, rights))
    update = left * torch.cat(values) @ right.t()
    return (base + (update.t() if wide else update)).to(base.dtype)


def _whitened(columns: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(columns.t() @ columns)
    return columns @ (vectors * values.rsqrt()) @ vectors.t()


def _iso_c_matrix(base: Tensor, experts: list[Tensor]) -> Tensor:
    update = sum((expert - base).double() for expert in experts)
    update = update.t() if (wide := base.shape[0] < base.shape[1]) else update
    squares, vectors = torch.linalg.eigh(update.t() @ update)
    roots = squares.sqrt()
    flat = roots.mean() * (update @ (vectors / roots)) @ vectors.t()
    return (base + (flat.t() if wide else flat)).to(base.dtype)


def _spectral(matrix: object, base: State, experts: dict[str, State]) -> State:
    """Workers over parameters with one BLAS thread each."""

    def merge(name: str) -> Tensor:
        values = [expert[name] for expert in experts.values()]
        if base[name].ndim == 2:
            return matrix(base[name], values)
        return base[name] + sum(value - base[name] for value in values) / len(values)

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        merged = dict(zip(base, pool.map(merge, base), strict=True))
    torch.set_num_threads(threads)
    return merged


PROTOTYPES: dict[str, Contender] = {
    "average": average,
    "linear": average,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "tsv": partial(_spectral, _tsv_matrix),
    "iso_c": partial(_spectral, _iso_c_matrix),
}
