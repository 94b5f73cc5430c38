"""The expert pool: a folder with one base and the experts that were fine-tuned from it."""

import importlib
import json
import re
import uuid
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.calibration import CalibrationInputs
from lightning_merge.checkpoints import read_checkpoint, under_prefix
from lightning_merge.files import read_json, replacing, save_tensors, write_json, write_tensors
from lightning_merge.lora import LoRAExpert, is_adapter
from lightning_merge.networks import clean_names, first_linear, get_submodule, split_state
from lightning_merge.states import (
    LazyStateDict,
    StateDict,
    check_compatible,
    check_finite,
    fingerprint,
    tied_names,
)

FORMAT = "expert pool"
VERSION = 1
FIT_SECONDS = "fit/seconds"
"""Name of the score that holds how long an expert's fit took, from its start to its end."""
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ExpertPool:
    """A base and its experts on disk, with heads and unlabeled calibration inputs.

    Use :meth:`create` or :meth:`open`. Experts are added in any order and by several processes at
    a time; an expert is in the pool when its file is, and that is written last.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_json(self.path / "pool.json", FORMAT, VERSION)
        self.head: str = manifest["head"]
        """Dotted path of the head in the experts' network."""
        self.model: dict[str, Any] | None = manifest["model"]
        """How to build the network: ``{"class_path", "init_args"}``, or ``None`` if not known."""
        self.fingerprint: str = manifest["fingerprint"]
        """Digest of the base's backbone; experts of another base are refused."""

    @classmethod
    def open(cls, path: str | Path) -> "ExpertPool":
        """Open a pool.

        Raises:
            ValueError: If the folder is no pool, is damaged, or of a newer format.
        """
        return cls(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        base: nn.Module,
        head: str,
        *,
        model: Mapping[str, Any] | None = None,
        exist_ok: bool = False,
    ) -> "ExpertPool":
        """Create a pool from the network that the experts start from.

        Args:
            path: Folder of the pool; made if it does not exist.
            base: The network before fine-tuning.
            head: Dotted path of its head, such as ``"head"`` or ``"net.9"``.
            model: How to build the network again: ``class_path`` (an ``nn.Module`` class or
                ``timm.create_model``) and ``init_args``, plain data.
            exist_ok: Open a pool that is there already, if it has this base and head.

        Raises:
            ValueError: If the head is unknown or has no linear layer, a weight is not finite, or
                another pool is in the folder.
        """
        path = Path(path)
        first_linear(get_submodule(base, head), head)
        backbone, _ = split_state(base, head)
        for name, value in backbone.items():
            check_finite(name, "the base", value)
        ties = tied_names(backbone)
        stored = {name: value for name, value in backbone.items() if name not in ties}
        digest = fingerprint(stored)
        if (path / "pool.json").exists():
            pool = cls.open(path)
            if exist_ok and (pool.fingerprint, pool.head) == (digest, head):
                return pool
            raise ValueError(_occupied(pool, digest, head, stored))
        write_tensors(path / "base.safetensors", stored, {"fingerprint": digest})
        write_json(
            path / "pool.json",
            {
                "format": {"name": FORMAT, "version": VERSION},
                "head": head,
                "model": None if model is None else dict(model),
                "fingerprint": digest,
            },
        )
        return cls.open(path)

    @property
    def base(self) -> LazyStateDict:
        """Backbone of the base."""
        return LazyStateDict(self.path / "base.safetensors")

    @property
    def tasks(self) -> list[str]:
        """Tasks whose experts are in, sorted by name."""
        return sorted(file.stem for file in (self.path / "experts").glob("[!.]*.safetensors"))

    def add(
        self,
        task: str,
        expert: nn.Module | StateDict | str | Path,
        *,
        calibration: Any = None,
        scores: Mapping[str, float] | None = None,
        trained_from: str | None = None,
        head: nn.Module | StateDict | None = None,
        overwrite: bool = False,
    ) -> None:
        """Add the expert of a task: its backbone, its head and its calibration inputs.

        Args:
            task: Name: letters, digits, dots, dashes and underscores.
            expert: The fine-tuned network, its state dict, a checkpoint file of it, or the folder
                of a LoRA adapter as peft saves it (written to the pool as a whole expert).
            calibration: Unlabeled inputs: a tensor ``(n, ...)``, a mapping of named tensors, or an
                iterable of such batches. Without them the expert cannot be corrected.
            scores: Figures to keep with the expert, such as its validation accuracy.
            trained_from: Fingerprint of the base that the fine-tuning started from, if known.
            head: Its head, where ``expert`` does not hold one, as an adapter may not.
            overwrite: Replace an expert of this name; otherwise that is an error.

        Raises:
            ValueError: If the name is taken or not a plain name, the expert has other keys or
                shapes, another base, or values that are not finite; the pool is as it was.
        """
        self.check_task(task, overwrite=overwrite)
        if trained_from is not None and trained_from != self.fingerprint:
            raise ValueError(
                f"expert '{task}' was fine-tuned from another base (fingerprint "
                f"{trained_from[:12]}) than the one of {self.path} ({self.fingerprint[:12]}). "
                "Experts merge only if they share their base: fine-tune it from this base, or use "
                "a pool of its own."
            )
        backbone, own = self._split(task, expert)
        if head is not None:
            own = dict(head.state_dict() if isinstance(head, nn.Module) else head)
        base = self.base
        check_compatible(base, {task: backbone})
        for name, value in [*backbone.items(), *own.items()]:
            check_finite(name, f"expert '{task}'", value)
        _warn_if_implausible(task, base, backbone)
        inputs = None if calibration is None else CalibrationInputs.collect(calibration)
        if not own:
            raise ValueError(
                f"expert '{task}' has no parameters below its head '{self.head}'. Give the whole "
                "network, not its backbone alone, or its head with head=."
            )
        stamp = {
            "id": uuid.uuid4().hex,
            "task": task,
            "fingerprint": self.fingerprint,
            "scores": json.dumps(dict(scores or {})),
            "calibration": str(0 if inputs is None else len(inputs)),
        }
        with ExitStack() as files:  # closed in reverse: the expert, last, makes the task exist
            paths = [
                files.enter_context(replacing(self._file(part, task)))
                for part in ("experts", "heads", "calibration")[: 2 + (inputs is not None)]
            ]
            save_tensors(paths[0], backbone, stamp)
            save_tensors(paths[1], own, stamp)
            if inputs is not None:
                save_tensors(paths[2], inputs.tensors(), stamp)
        if inputs is None:
            self._file("calibration", task).unlink(missing_ok=True)

    def check_task(self, task: str, *, overwrite: bool = False) -> None:
        """Raise a ``ValueError`` if a task of this name could not be added."""
        if not TASK_NAME.fullmatch(task):
            raise ValueError(
                f"task name {task!r}: expected letters, digits, dots, dashes and underscores, "
                "starting with a letter or digit (it names files). Choose another name."
            )
        if not overwrite and self._file("experts", task).exists():
            raise ValueError(
                f"{self.path} already has an expert '{task}'. Choose another name or pool, or "
                "replace it with overwrite=True."
            )

    def remove(self, task: str) -> None:
        """Remove a task and its files."""
        self._known(task)
        for part in ("experts", "heads", "calibration"):
            self._file(part, task).unlink(missing_ok=True)

    def expert(self, task: str) -> LazyStateDict:
        """Backbone of a task's expert, read lazily.

        Raises:
            ValueError: If the task is unknown, its file damaged, or of another base.
        """
        return self._read("experts", task)

    def head_state(self, task: str) -> dict[str, Tensor]:
        """Head of a task's expert, names relative to the head."""
        return dict(self._read("heads", task))

    def calibration(self, task: str) -> CalibrationInputs | None:
        """Unlabeled inputs of a task, read lazily, or ``None`` if it was added without."""
        self._known(task)
        if not self._file("calibration", task).exists():
            return None
        return CalibrationInputs(self._read("calibration", task))

    def scores(self, task: str) -> dict[str, float]:
        """Figures kept with the expert, such as its validation accuracy."""
        return dict(json.loads(self.expert(task).metadata["scores"]))

    def network(self) -> nn.Module:
        """Build the network from :attr:`model`, with random weights.

        Raises:
            ValueError: If the pool does not know how; give the module instead.
        """
        if self.model is None:
            raise ValueError(
                f"{self.path} does not know how to build its network (its pool.json has no model): "
                "pass the module, as in merge_experts(pool, method, module=my_module)."
            )
        return build_network(self.model)

    def _file(self, part: str, task: str) -> Path:
        return self.path / part / f"{task}.safetensors"

    def _known(self, task: str) -> None:
        if not self._file("experts", task).exists():
            known = ", ".join(self.tasks) or "none yet"
            raise ValueError(f"{self.path} has no expert '{task}'; it has: {known}.")

    def _read(self, part: str, task: str) -> LazyStateDict:
        self._known(task)
        expert = LazyStateDict(self._file("experts", task))
        state = expert if part == "experts" else LazyStateDict(self._file(part, task))
        if expert.metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"expert '{task}' in {self.path} belongs to another base (fingerprint "
                f"{expert.metadata.get('fingerprint', 'none')[:12]}, expected "
                f"{self.fingerprint[:12]}). Fine-tune it from this base, or remove it."
            )
        if state.metadata.get("id") != expert.metadata.get("id"):
            raise ValueError(
                f"{state.path} does not belong to the expert '{task}' beside it: an addition was "
                "cut off, or a file was copied in. Add the expert again."
            )
        return state

    def _file_of(self, path: str | Path) -> StateDict:
        if not is_adapter(path):
            return read_checkpoint(path)
        adapted = LoRAExpert(path, self.base)
        return {**adapted, **adapted.others()}

    def _split(
        self, task: str, expert: nn.Module | StateDict | str | Path
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if isinstance(expert, nn.Module):
            backbone, head = split_state(expert, self.head)
        else:
            source = f"expert '{task}'"
            if isinstance(expert, (str, Path)):
                source, expert = str(expert), self._file_of(expert)
            _, inside = under_prefix(clean_names(expert), list(self.base), source)
            prefix = f"{self.head}."
            head = {
                name.removeprefix(prefix): value
                for name, value in inside.items()
                if name.startswith(prefix)
            }
            backbone = {name: inside[name] for name in inside if not name.startswith(prefix)}
        # A name that is tied to another one in the base is stored once there, so here too.
        ties = tied_names(backbone)
        base = self.base
        backbone = {n: value for n, value in backbone.items() if n in base or n not in ties}
        head_ties = tied_names({**backbone, **{f"{self.head}.{n}": v for n, v in head.items()}})
        head = {n: v.clone() if f"{self.head}.{n}" in head_ties else v for n, v in head.items()}
        return backbone, head


def build_network(model: Mapping[str, Any]) -> nn.Module:
    """Build a network from ``{"class_path", "init_args"}``.

    Raises:
        ValueError: If the class is neither an ``nn.Module`` nor ``timm.create_model``, or cannot
            be imported or built.
    """
    class_path, init_args = model["class_path"], dict(model.get("init_args") or {})
    module_name, _, name = class_path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import '{class_path}' ({error}): install the package that has it, or pass the "
            "module itself."
        ) from error
    # An artifact names what to call, so only builders of networks are called.
    if class_path != "timm.create_model" and not (
        isinstance(factory, type) and issubclass(factory, nn.Module)
    ):
        raise ValueError(f"'{class_path}' is neither an nn.Module class nor timm.create_model.")
    kind = getattr(factory, "config_class", None)  # of transformers: plain data makes the config
    if kind is not None and isinstance(init_args.get("config"), dict):
        init_args["config"] = kind(**init_args["config"])
    try:
        return factory(**init_args)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"cannot build '{class_path}' with {init_args}: {error}") from error


def _warn_if_implausible(task: str, base: StateDict, expert: StateDict) -> None:
    distance = relative_distance(base, expert)
    if distance > 1.0:
        warnings.warn(
            f"expert '{task}' is implausibly far from the base (median relative distance "
            f"{distance:.2f}, fine-tuning gives well below 1): it may "
            "come from another base or a random initialisation, and its task vector then means "
            "nothing. Start its fit from the pool's base.",
            stacklevel=3,
        )


def relative_distance(base: StateDict, expert: StateDict) -> float:
    """Median over the matrices of how far an expert is from its base, relative to the base's norm.

    Fine-tuning gives well below 1, two random initialisations about 1.4. Matrices that are not in
    both, in the same shape, do not count; 0 where there is none.
    """
    ratios = []
    for name in base:
        if name not in expert or expert[name].shape != base[name].shape:
            continue
        origin = base[name]
        if origin.is_floating_point() and origin.ndim >= 2 and origin.numel():
            moved = torch.linalg.vector_norm(expert[name].float().cpu() - origin.float())
            ratios.append(float(moved / torch.linalg.vector_norm(origin.float()).clamp_min(1e-12)))
    return sorted(ratios)[len(ratios) // 2] if ratios else 0.0


def _occupied(pool: ExpertPool, digest: str, head: str, found: StateDict) -> str:
    if pool.head != head:
        return f"{pool.path} has the head '{pool.head}', found '{head}'. Use the same head."
    if pool.fingerprint != digest:
        distance = relative_distance(pool.base, found)
        guess = (
            "as two random initialisations are: experts of these cannot be merged"
            if distance > 1
            else "as a network is that was trained further"
        )
        return (
            f"{pool.path} holds another base (fingerprint {pool.fingerprint[:12]}, this network "
            f"has {digest[:12]}; it is {distance:.2f} of the base's norm away, {guess}). Start "
            f"every fit from the pool's base, which is {pool.path / 'base.safetensors'} without "
            "its head, or give a folder of its own."
        )
    return f"{pool.path} is a pool already. Open it with ExpertPool.open, or give another folder."
