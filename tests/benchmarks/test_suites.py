"""The benchmarks' own machinery at toy size."""

import statistics

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import results
from benchmarks.calibration_size import SIZES, measure, sizes_of
from benchmarks.features import merge, references
from benchmarks.selection import CORRECTIONS, trials
from benchmarks.suites import SUITES, Suite, TableTransformer, TaskData, build, real
from lightning_merge import merge_experts
from lightning_merge.correction import CorrectionOptions
from lightning_merge.methods import Average, TaskArithmetic


def points(seed, classes=3, size=120):
    """Clusters that any small network tells apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, 6, generator=generator)
    labels = torch.arange(size) % classes
    return centres[labels] + 0.5 * torch.randn(size, 6, generator=generator), labels


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 10),
            nn.BatchNorm1d(10),
            nn.ReLU(),
            nn.Linear(10, 7),
            nn.ReLU(),
            nn.Linear(7, 1),
        )


TOY = Suite(
    network=network,
    head="5",
    base=lambda: points(9, 5),
    base_epochs=2,
    tasks=lambda seed: {
        name: TaskData(points(n), points(n), points(n)[0]) for n, name in enumerate("ab")
    },
    epochs=30,
    lr=1e-2,
)


@pytest.fixture
def experts(tmp_path):
    return build("toy", 1, tmp_path, TOY)


def test_experts_are_trained_once_and_alike(experts, tmp_path):
    files = sorted((tmp_path / "toy").rglob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    again = build("toy", 1, tmp_path, TOY)
    assert [file.stat().st_mtime_ns for file in files] == times
    assert again.pool.tasks == ["a", "b"]
    other = build("toy", 2, tmp_path, TOY)
    assert not torch.equal(
        again.pool.head_state("a")["weight"], other.pool.head_state("a")["weight"]
    )
    heads = [again.pool.head_state(task)["weight"] for task in "ab"]
    assert not torch.allclose(*heads, atol=0.05)  # first heads are not shared


def test_scores_are_those_of_the_merged_model(experts):
    """Features give what the assembled networks give, batch norms re-estimated."""
    merged = merge(experts, Average(), references(experts))
    model = merge_experts(
        experts.pool, Average(), module=experts.template, correction="paper", batch_size=250
    )
    p = {"a": 0.3, "b": 0.7}
    found = merged.scores(merged.correction(CorrectionOptions.paper()), p)
    plain = merged.scores(None, None)
    for task, data in experts.tasks.items():
        x, y = data.test
        expert = merged.references.accuracy[task]
        for score, net in (
            (found[task], model.with_preference(p, task)),
            (plain[task], model.uncorrected(task)),
        ):
            assert score * expert == pytest.approx(float((net(x).argmax(1) == y).double().mean()))


def test_calibration_sizes(experts):
    assert sizes_of(experts, "2 a class") == {"a": 6, "b": 6}
    assert sizes_of(experts, "10 %") == {"a": 12, "b": 12}
    merged = merge(experts, Average(), references(experts))
    plain, found, _ = measure(experts, merged)
    assert 0 < plain < 1.5
    assert len(found) == len(SIZES) * 3 * 2
    full = CorrectionOptions.paper()
    expected = merged.scores(merged.correction(full), "one-hot").values()
    assert found["100 %", "paper", "one_hot"] == [statistics.fmean(expected)]


def test_trials_of_the_base(experts):
    known = references(experts, 40)
    base = TaskArithmetic(scale=0.0)
    found = trials(base, merge(experts, base, known, limit=40))
    assert len(found) == len(CORRECTIONS)
    assert all(trial.is_base for trial in found)
    assert all(trial.error >= 0 for trial in found)


def test_every_suite_has_a_network_with_its_head():
    for name, suite in SUITES.items():
        head = suite.network().get_submodule(suite.head)
        assert isinstance(head, nn.Linear), name
    assert TableTransformer()(torch.randn(3, 16)).shape == (3, 8)


def test_results_name_command_versions_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["x", "--seeds", "[0]"])
    text = results.write("thing", "A thing", [0], [results.table(["a", "b"], [["x", 1]])])
    content = text.read_text()
    assert "python -m benchmarks.thing --seeds [0]" in content
    assert "torch 2" in content
    assert content.endswith("| a | b |\n| --- | ---: |\n| x | 1 |\n")
    assert results.mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


def test_real_calibration_samples_are_mixed(monkeypatch):
    """Some sets are sorted by class; the first samples must not be of one class only."""
    images = np.repeat(np.arange(40, dtype=np.uint8), 64).reshape(40, 8, 8)
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), (images, np.arange(40)))
    for name in ("digits", "mnist", "textures"):
        monkeypatch.setattr(f"benchmarks.suites.{name}", lambda seed: splits)
    data = real(0)["textures"]
    first = data.calibration[:, 0, 0, 0]
    assert torch.equal(first.sort().values, (torch.arange(40) / 127.5 - 1))
    assert first[:10].max() > first[10:].min()
    shown = data.train[0][:, 0, 0, 0]
    assert torch.allclose(shown, data.train[1] / 127.5 - 1)  # labels stay with their images
