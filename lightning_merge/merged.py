"""The merged model: a backbone, the experts' heads, and a correction that a preference solves."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from lightning_merge.backbones import SHARD_SIZE, read_backbone
from lightning_merge.calibrating import correction_statistics
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.correction import (
    ClosedFormCorrection,
    CorrectionOptions,
    CorrectionStatistics,
)
from lightning_merge.exporting import Format, write_network, write_timm
from lightning_merge.hub import fetch_folder, push_folder
from lightning_merge.merged_folder import (
    CORRECTION,
    HEADS,
    read_files,
    read_manifest,
    read_part,
    versions,
    write_merged,
)
from lightning_merge.networks import (
    build_head,
    first_linear,
    get_submodule,
    load_backbone,
    plain_copy,
    set_submodule,
    split_state,
)
from lightning_merge.pool import build_network
from lightning_merge.runtime import Runtime
from lightning_merge.steered import SteeredModel, folded_head


@dataclass(kw_only=True)
class MergedModel:
    """What a merge makes: steer it with :meth:`with_preference`, keep it with :meth:`save`."""

    network: nn.Module
    """Template of the network, with the merged backbone."""
    head: str
    """Dotted path of the head in the network."""
    heads: dict[str, nn.Module]
    """Head of every task, as its expert has it."""
    statistics: dict[str, CorrectionStatistics] = field(default_factory=dict)
    """Sufficient statistics of the correction by task; empty if there is none."""
    options: CorrectionOptions = field(default_factory=CorrectionOptions)
    """Hyper-parameters of the correction."""
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Prior and ridge of every task that a search has chosen already."""
    model: dict[str, Any] | None = None
    """How to build the network again: ``{"class_path", "init_args"}``."""
    record: dict[str, Any] = field(default_factory=dict)
    """Plain data on how it was made: method, pool, fingerprints, scores, timings."""
    report: dict[str, Any] = field(default_factory=dict)
    """Plain data on how the experts interfere, what parameters got, and what the method found."""
    files: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further files of the method, by name: plain data of a JSON file, or tensors."""

    def __post_init__(self) -> None:
        self._correction: ClosedFormCorrection | None = None

    @property
    def tasks(self) -> list[str]:
        """Tasks in their order: the one of preference vectors."""
        return list(self.heads)

    @property
    def correction(self) -> ClosedFormCorrection:
        """The correction of all tasks.

        Raises:
            ValueError: If the merge was made without one, or for some tasks only.
        """
        if missing := [task for task in self.tasks if task not in self.statistics]:
            raise ValueError(
                f"no correction statistics for {', '.join(missing)}: the merge was made without "
                "calibration inputs. Merge again with them, or use uncorrected()."
            )
        if self._correction is None:
            statistics = {task: self.statistics[task] for task in self.tasks}
            self._correction = self.options.build(statistics, self.linear_heads(), self.choices)
        return self._correction

    def linear_heads(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """First linear layer of every head: weight ``(K, k)`` and bias ``(K,)`` or ``None``."""
        layers = {task: first_linear(head, self.head)[1] for task, head in self.heads.items()}
        return {
            task: (layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
            for task, layer in layers.items()
        }

    @overload
    def with_preference(self, preference: Mapping[str, float] | Tensor) -> SteeredModel: ...
    @overload
    def with_preference(self, preference: Mapping[str, float] | Tensor, task: str) -> nn.Module: ...
    def with_preference(
        self, preference: Mapping[str, float] | Tensor, task: str | None = None
    ) -> nn.Module:
        """Tailor the model to a preference, at no cost in inference.

        Args:
            preference: Weight by task (tasks left out count 0) or ``(T,)`` in the order of
                :attr:`tasks`; non-negative, normalised to sum to one.
            task: Return the plain network of this task alone: the expert's class and names.

        Returns:
            One backbone with the folded heads of all tasks, or the network of one task.

        Raises:
            ValueError: If the preference is negative, not finite or all zero.
            KeyError: If it names an unknown task.
        """
        folded = {}
        for name in self.tasks if task is None else [self._known(task)]:
            weight, bias = self.linear_heads()[name]
            folded[name] = folded_head(
                self.heads[name],
                self.head,
                *self.correction.fold(preference, name, weight, bias),
            )
        if task is not None:
            return self._assembled(folded[task])
        if not isinstance(preference, Mapping):
            preference = dict(zip(self.tasks, preference.tolist(), strict=True))
        return SteeredModel(plain_copy(self.network), self.head, folded, preference)

    def per_task(self) -> SteeredModel:
        """Every head folded with its own task's map: the ceiling where the task is known.

        One backbone still serves all tasks, and no preference trades them: with separate heads
        and known tasks, nothing that a shared map does is better on the calibration error.
        """
        folded = {}
        for name, (weight, bias) in self.linear_heads().items():
            own = self.correction.fold({name: 1.0}, name, weight, bias)
            folded[name] = folded_head(self.heads[name], self.head, *own)
        return SteeredModel(plain_copy(self.network), self.head, folded, {})

    @overload
    def uncorrected(self) -> SteeredModel: ...
    @overload
    def uncorrected(self, task: str) -> nn.Module: ...
    def uncorrected(self, task: str | None = None) -> nn.Module:
        """The merged backbone with the experts' own heads; of one task: its plain network."""
        if task is not None:
            return self._assembled(self.heads[self._known(task)])
        return SteeredModel(plain_copy(self.network), self.head, self.heads, {})

    def add_task(
        self,
        task: str,
        expert: nn.Module,
        calibration: Any,
        *,
        runtime: Runtime | None = None,
        batch_size: int = 128,
    ) -> "MergedModel":
        """Add a task to the correction, exactly; the merged backbone stays as it is.

        Args:
            task: Its name.
            expert: Its fine-tuned network, with its head.
            calibration: Its unlabeled inputs, as ``ExpertPool.add`` takes them.
            runtime: Device and processes; one process on the CPU by default.
            batch_size: Samples a forward pass.

        Returns:
            This model, changed in place.
        """
        if task in self.heads:
            raise ValueError(f"task '{task}' is in the model already; drop it first to replace it.")
        runtime = runtime or Runtime()
        head = get_submodule(plain_copy(expert), self.head)
        split_state(expert, self.head)
        statistics = correction_statistics(
            self._assembled(head).to(runtime.device),
            plain_copy(expert).to(runtime.device),
            self.head,
            CalibrationInputs.collect(calibration),
            runtime,
            batch_size=batch_size,
            description=f"Calibrating {task}",
        )
        self._keep_choices()
        self.heads[task] = head
        self.statistics[task] = statistics
        return self

    def drop_task(self, task: str) -> "MergedModel":
        """Drop a task from the correction, exactly; the merged backbone stays as it is."""
        self._known(task)
        if len(self.heads) == 1:
            raise ValueError(f"'{task}' is the only task left; a model needs one.")
        self._keep_choices()
        del self.heads[task]
        self.statistics.pop(task, None)
        self.choices.pop(task, None)
        return self

    def export(
        self,
        path: str | Path,
        preference: Mapping[str, float] | Tensor,
        task: str | None = None,
        format: Format = "safetensors",  # noqa: A002
        example: Any = None,
    ) -> Path:
        """Write the tailored model to a file that needs nothing of this package.

        Args:
            path: The file to write; a folder for ``timm``.
            preference: As for :meth:`with_preference`.
            task: One task: the file has the expert's own parameter names. ``None``: all tasks.
            format: Weights as safetensors, a program as ONNX or torch.export, or a folder that
                ``timm.create_model("local-dir:PATH", pretrained=True)`` loads (one task).
            example: One batch of inputs, for ``onnx`` and ``torch_export``.

        Returns:
            The path written.
        """
        model = (
            self.with_preference(preference)
            if task is None
            else self.with_preference(preference, task)
        )
        if format == "timm":
            if task is None:
                raise ValueError("format 'timm' holds the network of one task: give task=...")
            return write_timm(model.eval(), Path(path), self.model)
        metadata = {"tasks": ",".join(self.tasks if task is None else [task]), "head": self.head}
        return write_network(model.eval(), Path(path), format, example, metadata)

    def save(
        self,
        path: str | Path,
        *,
        shard_size: int = SHARD_SIZE,
        pictures: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the model as a folder, in one step: an older one stays until the new one is whole.

        Args:
            path: The folder.
            shard_size: Bytes from which the backbone is written in several files with an index,
                in the folder ``backbone``; :meth:`load` reads either.
            pictures: PNG files to put beside it, by name; the model card shows them.

        Raises:
            OSError: If the disk is full or the folder cannot be written to.
        """
        heads = {task: head.state_dict() for task, head in self.heads.items()}
        sums = {task: statistics.tensors() for task, statistics in self.statistics.items()}
        write_merged(
            path,
            self._manifest(),
            split_state(self.network, self.head)[0],
            {HEADS: heads, CORRECTION: sums},
            shard_size=shard_size,
            pictures=pictures or {},
            files=self.files,
        )

    @classmethod
    def load(cls, path: str | Path, module: nn.Module | None = None) -> "MergedModel":
        """Read a merged model.

        Args:
            path: Its folder.
            module: The network it was made from, with any weights; needed where the folder does
                not know how to build it (neither timm nor a class path).

        Raises:
            ValueError: If the folder is no merged model, damaged, or of a newer format, or the
                network cannot be built.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if module is None and manifest["model"] is None:
            raise ValueError(
                f"{path} does not know how to build its network: pass the module, as in "
                "MergedModel.load(path, module=my_module)."
            )
        network = build_network(manifest["model"]) if module is None else plain_copy(module)
        head = manifest["head"]
        load_backbone(network, read_backbone(path), head)
        states = read_part(path / HEADS, manifest["tasks"])
        sums = read_part(path / CORRECTION, manifest["tasks"])
        return cls(
            network=network.eval(),
            head=head,
            heads={
                task: build_head(get_submodule(network, head), state).eval()
                for task, state in states.items()
            },
            statistics={
                task: CorrectionStatistics.from_tensors(tensors)
                for task, tensors in sums.items()
                if tensors
            },
            options=CorrectionOptions.from_dict(manifest["correction"]),
            choices=manifest.get("choices", {}),
            model=manifest["model"],
            record=manifest["record"],
            report=manifest.get("merge", {}),
            files={**read_files(path, manifest)},
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        message: str = "Upload merged model",
    ) -> str:
        """Upload the model's folder, as :meth:`save` writes it, to the Hugging Face hub.

        Args:
            repo_id: ``OWNER/NAME``; made if there is none.
            private: Whether a new repository is private.
            token: Access token; by default the one of ``hf auth login`` or ``HF_TOKEN``.
            message: Commit message.

        Returns:
            Address of the commit.

        Raises:
            ValueError: If the hub refuses.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save(folder)
            return push_folder(folder, repo_id, private=private, token=token, message=message)

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        module: nn.Module | None = None,
    ) -> "MergedModel":
        """Fetch a model that :meth:`push_to_hub` uploaded; later calls read the local cache.

        Args:
            repo_id: ``OWNER/NAME``.
            revision: Branch, tag or commit; pin one to be safe from changes.
            token: Access token for a private repository.
            cache_dir: Where downloads are kept; the hub's own place by default.
            module: As for :meth:`load`.

        Raises:
            ValueError: If it cannot be fetched, or is no merged model.
        """
        folder = fetch_folder(repo_id, revision=revision, token=token, cache_dir=cache_dir)
        return cls.load(folder, module)

    def _manifest(self) -> dict[str, Any]:
        return {
            "tasks": self.tasks,
            "head": self.head,
            "model": self.model,
            "correction": self.options.as_dict(),
            "choices": self.correction.choices() if self.statistics else {},
            "record": self.record,
            "merge": self.report,
            "versions": versions(),
        }

    def _keep_choices(self) -> None:
        """Before the tasks change: what was found for one of them holds, for their mixture not."""
        found = {} if self._correction is None else self._correction.settled()
        self.choices = {
            task: {name: value for name, value in choice.items() if name != "mixing_cap"}
            for task, choice in {**self.choices, **found}.items()
        }
        self._correction = None

    def _assembled(self, head: nn.Module) -> nn.Module:
        network = plain_copy(self.network)
        set_submodule(network, self.head, plain_copy(head))
        return network

    def _known(self, task: str) -> str:
        if task not in self.heads:
            raise KeyError(f"unknown task '{task}'; known: {', '.join(self.tasks)}.")
        return task
