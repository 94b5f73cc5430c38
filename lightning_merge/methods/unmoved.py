"""Experts that are the base itself: what is said of them."""

from collections.abc import Mapping, Sequence

from lightning_merge.states import LazyStateDict, StateDict


def unmoved(tasks: Sequence[str], same: Sequence[str]) -> list[str]:
    """A message for each expert that is the base, or one if all of them are.

    Args:
        tasks: All experts.
        same: Those that are the base.
    """
    if len(same) == len(tasks):
        return ["no expert differs from the base, so the merge is the base itself."]
    return [
        f"expert '{task}' is the base itself: all it adds is its weight in averages. Leave it "
        "out, unless the base is to take part."
        for task in same
    ]


def listed_again(base: StateDict, experts: Mapping[str, StateDict]) -> list[str]:
    """Tasks whose expert is the base: the same object, file or memory. No value is read."""
    return [task for task, expert in experts.items() if _is_one(base, expert)]


def _is_one(base: StateDict, expert: StateDict) -> bool:
    if expert is base:
        return True
    if isinstance(base, LazyStateDict) and isinstance(expert, LazyStateDict):
        return base.path.resolve() == expert.path.resolve()
    if not (isinstance(base, dict) and isinstance(expert, dict)):
        return False
    filled = [name for name in base if base[name].numel()]
    return bool(filled) and all(expert[n].data_ptr() == base[n].data_ptr() for n in filled)
