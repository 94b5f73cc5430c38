import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.evaluation import class_scores, count_correct, evaluate, sweep_task
from lightning_merge.networks import call_network
from lightning_merge.pareto import dirichlet
from lightning_merge.runtime import Runtime
from lightning_merge.sweeping import PreferenceGrid, sweep_model
from tests.networks import KINDS, MLP, make, tuned
from tests.test_merging import TASKS, experts_of


def labelled(shape):
    return {
        task: DataLoader(
            TensorDataset(torch.randn(37, *shape), torch.randint(size, (37,))), batch_size=8
        )
        for task, size in zip(TASKS, (3, 5, 2), strict=True)
    }


@pytest.fixture(params=KINDS)
def setting(request):
    base, head, shape = make(request.param)
    inputs = {task: torch.randn(20, *shape) for task in TASKS}
    model = merge_experts(experts_of(base, head), None, inputs, base=base, head=head)
    return model, labelled(shape)


def naive(model: MergedModel, task, preference, loader) -> int:
    """One full evaluation of one tailored model."""
    network = model.with_preference(preference, task).eval()
    correct = 0
    with torch.inference_mode():
        for x, y in loader:
            scores = call_network(network, x)
            scores = scores["logits"] if isinstance(scores, dict) else scores
            correct += int((scores.argmax(-1) == y).sum())
    return correct


def test_a_sweep_equals_the_naive_loop(setting):
    model, loaders = setting
    preferences = dirichlet(3, 6)
    for task in TASKS:
        found = sweep_task(model, task, preferences, loaders[task], Runtime())
        expected = [naive(model, task, p, loaders[task]) for p in preferences]
        assert found.correct.tolist() == expected
        assert found.samples == 37
        plain = evaluate(model.uncorrected(task), loaders[task], Runtime(), "plain")
        assert (found.uncorrected, 37) == plain


def test_memory_is_bounded_and_changes_nothing(setting):
    model, loaders = setting
    preferences = dirichlet(3, 6)
    whole = sweep_task(model, "b", preferences, loaders["b"], Runtime())
    split = sweep_task(model, "b", preferences, loaders["b"], Runtime(), max_logits=80)
    assert torch.equal(whole.correct, split.correct)


def test_each_test_set_runs_through_the_backbone_once(monkeypatch):
    base, head = MLP(), "net.9"
    experts = experts_of(base, head)
    inputs = {task: torch.randn(20, 6) for task in TASKS}
    model = merge_experts(experts, None, inputs, base=base, head=head)
    seen = []
    # nn.GELU is only in the backbone: the first of the four counts its passes, in samples.
    first = model.network.net[1]
    first.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    for count in (1, 200):
        seen.clear()
        loader = labelled((6,))["a"]
        sweep_task(model, "a", dirichlet(3, count), loader, Runtime())
        # 37 samples, and the first batch of 8 once more for the check against the plain network
        assert sum(seen) == 37 + 8


def test_the_kept_sample_is_spread_over_the_test_set():
    base, head = MLP(), "net.9"
    inputs = {task: torch.randn(20, 6) for task in TASKS}
    model = merge_experts(experts_of(base, head), None, inputs, base=base, head=head)
    data = TensorDataset(torch.randn(400, 6), torch.arange(400) % 3)
    found = sweep_task(
        model, "a", dirichlet(3, 2), DataLoader(data, batch_size=16), Runtime(), keep=50
    )
    assert 50 <= len(found.labels) <= 100
    expected = found.features @ model.with_preference(dirichlet(3, 2)[0], "a").net[9].weight.T
    assert expected.shape == (len(found.labels), 3)


def test_correct_answers_are_counted_by_preference():
    scores = torch.randn(5, 11, 4)
    labels = torch.randint(4, (11,))
    accuracy = MulticlassAccuracy(4, average="micro")
    expected = [round(11 * float(accuracy(one, labels))) for one in scores]
    assert count_correct(scores, labels).tolist() == expected


class Mixing(nn.Module):
    """A network that mixes the samples of a batch after its head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        scores = self.head(torch.relu(self.body(x)))
        return scores - 5 * scores.mean(0)


def test_a_network_that_mixes_samples_after_its_head_is_refused():
    base = Mixing()
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: torch.randn(20, 6) for task in TASKS}
    model = merge_experts(experts, None, inputs, base=base, head="head")
    with pytest.raises(ValueError, match="mixes samples of a batch after its head 'head'"):
        sweep_task(model, "a", dirichlet(3, 5), labelled((6,))["a"], Runtime())


def test_an_empty_test_set():
    base = MLP()
    with pytest.raises(ValueError, match="greek: the test set is empty"):
        evaluate(base, [], Runtime(), "greek")


def test_scores_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"class scores .* found \(3,\)"):
        class_scores(torch.zeros(3))
    with pytest.raises(ValueError, match="found dict"):
        class_scores({"scores": torch.zeros(3, 2)})


def test_the_result_of_a_sweep_has_every_row(tmp_path):
    base, head = MLP(), "net.9"
    experts = experts_of(base, head)
    pool = ExpertPool.create(tmp_path, base, head)
    for task in TASKS:
        pool.add(task, experts[task], calibration=torch.randn(20, 6))
    model = merge_experts(pool, module=base)
    loaders = labelled((6,))
    grid = PreferenceGrid(pairwise=3, response=3, lattice=2, priority=0.6)
    result, _ = sweep_model(model, pool, loaders.get, grid, Runtime())
    rows = result.rows()
    for index, task in enumerate(TASKS):
        n = 37
        assert rows["experts"][index] == naive_plain(experts[task], loaders[task]) / n
        corner = {task: 1.0}
        assert rows["one_hot"][index] == naive(model, task, corner, loaders[task]) / n
        favoured = {other: 0.6 if other == task else 0.2 for other in TASKS}
        assert rows["priority"][index] == naive(model, task, favoured, loaders[task]) / n
        equal = dict.fromkeys(TASKS, 1.0)
        assert rows["equal"][index] == naive(model, task, equal, loaders[task]) / n
    assert len(result.kinds) == 1 + 3 * (1 + 1 + 3) + 3 * 3 + math.comb(4, 2)


def naive_plain(network, loader):
    with torch.inference_mode():
        return sum(int((network(x).argmax(-1) == y).sum()) for x, y in loader)


@pytest.mark.parametrize(("tasks", "expected"), [(2, 149), (3, 15), (8, 3), (20, 1)])
def test_the_default_lattice_is_as_fine_as_is_cheap(tasks, expected):
    points, kinds, _ = PreferenceGrid(pairwise=0, response=0).points(
        tuple(f"t{i}" for i in range(tasks))
    )
    assert kinds.count("lattice") == math.comb(expected + tasks - 1, tasks - 1)
    assert len(points) == len(kinds)


@pytest.mark.parametrize("options", [{"priority": 0.0}, {"priority": 1.5}, {"pairwise": -1}])
def test_grids_out_of_range(options):
    with pytest.raises(ValueError, match="must"):
        PreferenceGrid(**options)
