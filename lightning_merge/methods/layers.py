"""Layers and blocks, read from the names of parameters."""

from collections.abc import Callable


def group_names(names: list[str], most: int) -> dict[str, list[str]]:
    """Group parameters by layer, or by block where there are more than ``most`` layers.

    Coarser and coarser: the module that holds the parameter, the innermost numbered part of its
    path, the outermost one, the first part, and everything.

    Example:
        >>> names = ["stem.weight", "blocks.0.fc.weight", "blocks.0.fc.bias", "blocks.1.fc.weight"]
        >>> list(group_names(names, 3)), list(group_names(names, 2))
        (['stem', 'blocks.0.fc', 'blocks.1.fc'], ['stem', 'blocks'])
    """
    groups: dict[str, list[str]] = {}
    for level in (_module, _inner_block, _outer_block, _first, _everything):
        groups = {}
        for name in names:
            groups.setdefault(level(name), []).append(name)
        if len(groups) <= most:
            break
    return groups


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def _inner_block(name: str) -> str:
    return _upto(name, lambda numbers: numbers[-1])


def _outer_block(name: str) -> str:
    return _upto(name, lambda numbers: numbers[0])


def _upto(name: str, choose: Callable[[list[int]], int]) -> str:
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: choose(numbers) + 1]) if numbers else _first(name)


def _first(name: str) -> str:
    return name.partition(".")[0]


def _everything(name: str) -> str:
    return "all"
