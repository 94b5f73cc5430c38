"""The tasks of one experiment as a data module: one task to fit, all of them to merge and sweep."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric
from typing_extensions import override

from lightning_merge.data.task import Task


class TaskSuite(LightningDataModule):
    """Tasks by name. ``fit``, ``validate``, ``test`` and ``predict`` see the selected one.

    ``predict`` runs over the selected task's calibration inputs.

    Args:
        tasks: Task of each name, in the order of every table.
        task: The selected task; needed by fit, validate, test and predict. A suite of one task
            selects it by itself.
        batch_size: Inputs a batch.
        num_workers: Loader processes; 0 loads in the main process.
        transductive: Calibrate on the test inputs themselves, without their labels. Published
            figures are often measured so; they say nothing about inputs that come later.

    Raises:
        ValueError: If there is no task, or ``task`` is none of them.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        task: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        transductive: bool = False,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("the suite has no tasks; give at least one under 'tasks'.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.tasks = dict(tasks)
        self.task = next(iter(tasks)) if task is None and len(tasks) == 1 else task
        if self.task is not None:
            self._find(self.task)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transductive = transductive

    @property
    def num_classes(self) -> int | None:
        """Classes of the selected task."""
        return self.selected.num_classes

    @property
    def selected(self) -> Task:
        """The selected task.

        Raises:
            ValueError: If none is selected.
        """
        if self.task is None:
            raise ValueError(
                f"no task is selected, and there are {len(self.tasks)}: "
                f"{', '.join(self.tasks)}. Choose one, as in --data.task {next(iter(self.tasks))}."
            )
        return self._find(self.task)

    def test_dataset(self, name: str) -> Dataset[Any]:
        """Labelled test items of one task."""
        return self._find(name).test()

    def test_metric(self, name: str) -> Metric | None:
        """What a sweep reports of one task; None is the accuracy."""
        return self._find(name).metric()

    def calibration_dataset(self, name: str) -> Dataset[Any]:
        """Unlabeled calibration inputs of one task."""
        task = self._find(name)
        return _Unlabeled(task.test()) if self.transductive else task.calibration()

    def dataloader(self, dataset: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        """Batches of a dataset, with this suite's batch size and workers."""
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    @override
    def prepare_data(self) -> None:
        """Prepare the selected task, or all of them where none is selected."""
        for task in self.tasks.values() if self.task is None else [self.selected]:
            task.prepare()

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches of the selected task."""
        return self.dataloader(self.selected.train(), shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches of the selected task."""
        return self.dataloader(self.selected.validation())

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches of the selected task."""
        return self.dataloader(self.selected.test())

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Calibration batches of the selected task: inputs alone."""
        task = self.selected  # which says so where none is selected
        unlabeled = _Unlabeled(task.test()) if self.transductive else task.calibration()
        return self.dataloader(unlabeled)

    def _find(self, name: str) -> Task:
        if name not in self.tasks:
            raise ValueError(f"unknown task '{name}'; this suite has {', '.join(self.tasks)}.")
        return self.tasks[name]


class _Unlabeled(Dataset[Any]):
    """The inputs of labelled items."""

    def __init__(self, items: Dataset[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self._items[index][0]
