import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule
from torch.utils.data import Dataset

from lightning_merge.data import GlyphTask, Task, TaskSuite

SMALL = {"train_size": 33, "val_size": 17, "test_size": 16, "calibration_size": 21}


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Numbers(Task):
    """Inputs that tell task and split apart: offset + position."""

    def __init__(self, offset: float = 0.0, classes: int = 3):
        self.offset, self.classes, self.prepared = offset, classes, 0

    @property
    def num_classes(self):
        return self.classes

    def prepare(self):
        self.prepared += 1

    def _split(self, start):
        first = self.offset + start
        return Rows([(torch.tensor([first + i]), i % self.classes) for i in range(7)])

    def train(self):
        return self._split(0)

    def validation(self):
        return self._split(100)

    def test(self):
        return self._split(200)

    def calibration(self):
        return Rows([x for x, _ in self._split(300).rows])


@pytest.fixture
def suite():
    return TaskSuite({"a": Numbers(), "b": Numbers(1000.0, 5)}, task="b", batch_size=3)


def inputs(loader):
    batches = [batch[0] if isinstance(batch, list) else batch for batch in loader]
    return torch.cat(batches).flatten().tolist()


def test_loaders_are_those_of_the_selected_task(suite):
    assert suite.num_classes == 5
    train = inputs(suite.train_dataloader())
    assert sorted(train) == [1000 + i for i in range(7)]
    assert inputs(suite.val_dataloader()) == [1100 + i for i in range(7)]
    assert inputs(suite.test_dataloader()) == [1200 + i for i in range(7)]
    assert inputs(suite.predict_dataloader()) == [1300 + i for i in range(7)]
    assert isinstance(next(iter(suite.predict_dataloader())), torch.Tensor)


def test_training_batches_are_shuffled_anew(suite):
    torch.manual_seed(0)
    loader = suite.train_dataloader()
    assert len({tuple(inputs(loader)) for _ in range(5)}) > 1


def test_all_tasks_are_there_for_merge_and_sweep(suite):
    assert list(suite.tasks) == ["a", "b"]
    assert inputs(suite.dataloader(suite.test_dataset("a"))) == [200 + i for i in range(7)]
    assert inputs(suite.dataloader(suite.calibration_dataset("a"))) == [300 + i for i in range(7)]


def test_only_the_selected_task_is_prepared(suite):
    suite.prepare_data()
    assert [task.prepared for task in suite.tasks.values()] == [0, 1]
    both = TaskSuite({"a": Numbers(), "b": Numbers()})
    both.prepare_data()
    assert [task.prepared for task in both.tasks.values()] == [1, 1]


def test_one_task_selects_itself():
    assert TaskSuite({"only": Numbers()}).task == "only"


def test_errors_name_the_tasks(suite):
    with pytest.raises(ValueError, match="unknown task 'c'; this suite has a, b"):
        TaskSuite({"a": Numbers(), "b": Numbers()}, task="c")
    with pytest.raises(ValueError, match=r"unknown task '\.\./b'"):
        suite.test_dataset("../b")
    with pytest.raises(ValueError, match="no task is selected, and there are 2: a, b"):
        TaskSuite({"a": Numbers(), "b": Numbers()}).train_dataloader()
    with pytest.raises(ValueError, match="no task is selected"):
        _ = TaskSuite({"a": Numbers(), "b": Numbers()}).num_classes
    with pytest.raises(ValueError, match="has no tasks"):
        TaskSuite({})
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        TaskSuite({"a": Numbers()}, batch_size=0)


def parse(arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate(parser.parse_args(arguments)).data


def test_from_the_command_line_with_short_class_names():
    tasks = (
        '{"greek": {"class_path": "GlyphTask", "init_args": {"script": "greek"}},'
        ' "math": {"class_path": "GlyphTask", "init_args": {"script": "math", "seed": 4}}}'
    )
    suite = parse(["--data=TaskSuite", f"--data.tasks={tasks}", "--data.task=math"])
    assert isinstance(suite, TaskSuite)
    assert suite.selected is suite.tasks["math"]
    assert isinstance(suite.selected, GlyphTask)
    assert suite.selected.seed == 4
    with pytest.raises(ArgumentError, match="runes"):
        parse(["--data=TaskSuite", f"--data.tasks={tasks.replace('math', 'runes')}"])


def test_a_transductive_suite_calibrates_on_the_test_inputs_alone():
    suite = TaskSuite({"low": Numbers()}, batch_size=4, transductive=True)
    found = suite.calibration_dataset("low")
    test = suite.test_dataset("low")
    assert len(found) == len(test)
    assert [float(found[i]) for i in range(len(found))] == [float(test[i][0]) for i in range(7)]
    batches = list(suite.predict_dataloader())
    assert all(isinstance(batch, torch.Tensor) for batch in batches)
    assert torch.cat(batches).flatten().tolist() == [float(test[i][0]) for i in range(7)]
