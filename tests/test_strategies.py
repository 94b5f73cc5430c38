import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.progress import Progress
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from lightning_merge.runtime import Runtime
from lightning_merge.strategies import FirstProcessError, on_first, runtime_of, sharded


def trainer_of(*callbacks, **options):
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(11))


LOADERS = {
    "in order": (lambda: DataLoader(range(11), 3), range(11)),
    "shuffled": (lambda: DataLoader(range(11), 3, shuffle=True), range(11)),
    "drops the last": (lambda: DataLoader(range(11), 3, drop_last=True), range(11)),
    "subset": (lambda: DataLoader(range(11), 3, sampler=SubsetRandomSampler([9, 2, 5])), [2, 5, 9]),
    "stream": (lambda: DataLoader(Stream(), 3), range(11)),
    "no batches": (lambda: DataLoader(range(11), None), range(11)),
    "list": (lambda: [torch.arange(5), torch.arange(5, 11)], range(11)),
    "one sample": (lambda: DataLoader(range(1), 3), [0]),
}


@pytest.mark.parametrize("world", [1, 2, 3, 20])
@pytest.mark.parametrize("kind", LOADERS)
def test_shares_hold_each_sample_once(kind, world):
    make, expected = LOADERS[kind]
    found = []
    for rank in range(world):
        for batch in sharded(make(), Runtime(rank=rank, world_size=world)):
            found += torch.as_tensor(batch).reshape(-1).tolist()
    assert sorted(found) == list(expected)


def test_batches_do_not_depend_on_the_number_of_processes():
    whole = [batch.tolist() for batch in sharded(DataLoader(range(11), 4), Runtime())]
    shares = [
        [b.tolist() for b in sharded(DataLoader(range(11), 4), Runtime(rank=r, world_size=2))]
        for r in range(2)
    ]
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert shares == [[whole[0], whole[2]], [whole[1]]]


def test_the_sum_leaves_its_argument_alone_and_keeps_its_type():
    runtime = runtime_of(trainer_of())
    value = torch.tensor([1, 2], dtype=torch.int64)
    total = runtime.reduce(value)
    assert total.dtype == torch.int64
    assert total.data_ptr() != value.data_ptr()
    assert (runtime.rank, runtime.world_size, runtime.device) == (0, 1, torch.device("cpu"))


class Second:
    """The second process of a Trainer, which hears what the first one has to say."""

    is_global_zero = False

    def __init__(self, heard):
        self.strategy, self._heard = self, heard

    def broadcast(self, value):
        assert value == (None, None)
        return self._heard


def test_results_and_errors_of_the_first_process_reach_all():
    assert on_first(trainer_of(), lambda: 3) == 3
    assert on_first(Second((3, None)), pytest.fail) == 3
    with pytest.raises(OSError, match="disk is full"):
        on_first(trainer_of(), lambda: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(FirstProcessError, match="the first process failed: OSError: disk"):
        on_first(Second((None, "OSError: disk is full")), pytest.fail)


def shown(trainer, capsys):
    """What is on the screen while items pass, and after them."""
    yield from runtime_of(trainer).progress(iter("ab"), 2, "Calibrating")
    captured = capsys.readouterr()
    yield captured.out + captured.err


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_a_bar_is_shown(bar, capsys):
    *items, text = shown(trainer_of(bar()), capsys)
    assert items == ["a", "b"]
    # rich draws its transient bar on terminals only
    assert "Calibrating" in text or bar is RichProgressBar


def test_no_bar_where_it_is_switched_off(capsys):
    *items, text = shown(trainer_of(enable_progress_bar=False), capsys)
    assert (items, text) == (["a", "b"], "")
    disabled = TQDMProgressBar()
    disabled.disable()
    *items, text = shown(trainer_of(disabled), capsys)
    assert (items, text) == (["a", "b"], "")


def test_the_line_is_added_to_the_display_of_a_running_fit():
    bar = RichProgressBar()
    trainer = trainer_of(bar)
    bar.progress = Progress()
    with bar.progress:
        list(runtime_of(trainer).progress(iter("ab"), 2, "Calibrating"))
        (task,) = bar.progress.tasks
        assert (task.description, task.completed) == ("Calibrating", 2)
        assert bar.progress.live.is_started
