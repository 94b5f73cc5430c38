"""The methods that solve layers, on networks that they know nothing of, and by every way in."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.batch_norm import reestimate_batch_norm
from lightning_merge.cli import main
from lightning_merge.layers.sites import find_sites
from lightning_merge.layers.tracing import trace
from lightning_merge.merging import describe
from lightning_merge.methods import OutputProjection, RegMean, TaskArithmetic
from lightning_merge.methods.output_error import output_error
from lightning_merge.methods.projection import ALL_KINDS
from lightning_merge.networks import call_network, load_backbone, split_state
from lightning_merge.runtime import Runtime
from tests.callbacks.project import Classifier, samples
from tests.layers.networks import Decoder, Memory, calibration_of, case, experts_of
from tests.networks import make, tuned

LAYERS = {"vit": 2 * 6 + 2, "convnext": 4 * 4 + 3 * 2 + 2, "resnet": 20}


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet"])
def test_timm_networks(kind):
    network, head, shape = make(kind)
    experts = {f"t{seed}": tuned(network, seed, 0.2) for seed in range(2)}
    inputs = {task: torch.randn(6, *shape) for task in experts}
    sites = find_sites(network, head, list(network.state_dict()), ALL_KINDS)
    assert len(sites.handled) >= LAYERS[kind]
    assert not trace(network, sites.handled, inputs["t0"][:2]).unused
    basis = {"vit": "full", "convnext": "row", "resnet": "task"}[kind]
    for method in (OutputProjection(basis=basis), RegMean()):
        model = merge_experts(
            experts, method, inputs, base=network, head=head, correction=None, batch_size=4
        )
        assert model.record["method"] == describe(method)
        assert all(v.isfinite().all() for v in model.network.state_dict().values())


def test_batch_norms_get_the_statistics_of_the_merged_network():
    network, head, shape = make("resnet")
    experts = {f"t{seed}": tuned(network, seed, 0.2) for seed in range(2)}
    inputs = {task: torch.randn(10, *shape) for task in experts}
    calibration = calibration_of(experts, inputs, head, batch_size=5)
    base = split_state(network, head)[0]
    states = {task: split_state(expert, head)[0] for task, expert in experts.items()}
    method = OutputProjection(basis="row", tokens_per_sample=None, num_folds=None)
    state, reports = method.project(base, states, calibration)
    # One mixed batch of all samples: smaller ones are normalised by their own statistics.
    assert all(r.captured > max(r.heuristics.values()) - 1e-6 for r in reports)
    load_backbone(network, state, head)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert reestimate_batch_norm(network, head, calibration.inputs, Runtime(), batch_size=20)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)
    equal = torch.tensor([0.5, 0.5]).double()
    error = output_error(network, calibration, list(states), equal, None, fold=None)
    assert math.isfinite(error)


class Activated(nn.BatchNorm2d):
    """As the batch norms of timm that hold their activation."""

    def forward(self, x):
        return nn.functional.silu(super().forward(x))


class Mixed(nn.Module):
    """A batch norm that is no plain norm, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3), Activated(4)
        self.second, self.plain = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.plain(self.second(self.norm(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_norm_with_an_activation_inside_is_averaged_and_all_else_goes_on(mode):
    torch.manual_seed(0)
    network = Mixed()
    base, states, calibration, experts = case(network, "head", (2, 8, 8))
    method = OutputProjection(mode=mode, num_folds=None, safeguard=False)
    told = "1 layers are merged by Average.*: norm. Activated does more than scale and shift"
    with pytest.warns(UserWarning, match=told):
        merged, reports = method.project(base, states, calibration)
    assert [report.name for report in reports] == ["first", "second", "plain"]
    for name in ("norm.weight", "norm.bias"):
        mean = torch.stack([state[name] for state in states.values()]).mean(0)
        torch.testing.assert_close(merged[name], mean)
    # Its statistics are those of the merge all the same.
    with pytest.warns(UserWarning, match=told):
        model = merge_experts(
            experts, method, calibration.inputs, base=network, head="head",
            correction=None, report="off",
        )  # fmt: skip
    reached = []
    handle = model.network.norm.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
    size = min(len(inputs) for inputs in calibration.inputs.values())
    for task in experts:
        with torch.no_grad():
            model.network(calibration.inputs[task][slice(0, size)])
    handle.remove()
    values = torch.cat(reached)
    mean, variance = values.mean((0, 2, 3)), values.var((0, 2, 3))
    torch.testing.assert_close(model.network.norm.running_mean, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.network.norm.running_var, variance, rtol=1e-2, atol=1e-3)


def test_a_transformers_encoder_with_padding():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=9,
        num_labels=3,
    )
    network = transformers.BertForSequenceClassification(config).eval()
    experts = experts_of(network, 2, 0.1)
    lengths = torch.arange(12) % 5 + 3
    batch = {
        "input_ids": torch.randint(0, 13, (12, 7)),
        "attention_mask": (torch.arange(7)[None] < lengths[:, None]).long(),
    }
    calibration = calibration_of(experts, dict.fromkeys(experts, batch), "classifier", 5)
    base = split_state(network, "classifier")[0]
    states = {task: split_state(expert, "classifier")[0] for task, expert in experts.items()}
    merged, reports = OutputProjection(basis="row").project(base, states, calibration)
    names = {report.name for report in reports}
    assert "bert.encoder.layer.1.attention.self.value" in names
    assert "bert.embeddings.word_embeddings" in names
    assert "bert.encoder.layer.0.output.LayerNorm" in names
    sites = find_sites(network, "classifier", list(base), ALL_KINDS).handled
    order = trace(network, sites, batch)
    shared = {tuple(s.name.rpartition(".")[2] for s in g.sites) for g in order.groups}
    assert ("query", "key", "value") in shared
    load_backbone(network, merged, "classifier")
    assert call_network(network, batch).logits.isfinite().all()


class ClosedMemory(Memory):
    """A memory with a part that no copy is known for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {0}


SEQUENTIAL = [
    OutputProjection(num_folds=None, safeguard=False),
    OutputProjection(num_folds=None, safeguard=False, targets="same_input"),
    RegMean(inputs="merged"),
]


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_blocks_that_write_into_their_arguments_are_resumed_as_they_were_found(method):
    torch.manual_seed(0)
    base, states, calibration, _ = case(Decoder(), "head", (5, 4), tasks=2)
    merged = method.merge(base, states, calibration)
    closed = case_with(calibration, ClosedMemory)
    with pytest.warns(UserWarning, match=r"block 'blocks\.0' is called with a set, .* whole pass"):
        whole = method.merge(base, states, closed)
    for name, value in whole.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


def case_with(calibration, memory):
    """The same with another memory in the networks."""

    def network(task):
        found = calibration.network(task)
        found.memory = memory
        return found

    return replace(calibration, network=network)


@pytest.mark.parametrize("masked", [True, False])
def test_a_transformers_decoder_with_its_cache(masked):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        num_labels=3,
    )
    torch.manual_seed(0)
    network = transformers.LlamaForSequenceClassification(config).eval()
    experts = experts_of(network, 2, 0.1)
    lengths = torch.arange(12) % 5 + 3
    batch = {"input_ids": torch.randint(1, 13, (12, 7))}
    if masked:
        batch["attention_mask"] = (torch.arange(7)[None] < lengths[:, None]).long()
    calibration = calibration_of(experts, dict.fromkeys(experts, batch), "score", 5)

    def uncached(task):
        found = calibration.network(task)
        found.config.use_cache = False
        return found

    base = split_state(network, "score")[0]
    states = {task: split_state(expert, "score")[0] for task, expert in experts.items()}
    for method in SEQUENTIAL:
        merged = method.merge(base, states, calibration)
        expected = method.merge(base, states, replace(calibration, network=uncached))
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)


class Transposed(nn.Module):
    """As the linear layers of GPT-2: the weight is (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x @ self.weight * self.scale


class Tokened(nn.Module):
    """A network whose matrices are a layer's, a stranger's, and a token."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 5))
        self.first, self.strange = nn.Linear(5, 5), Transposed()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.strange(self.first(x + self.token)))


@pytest.mark.parametrize("method", [OutputProjection(num_folds=None), RegMean()])
def test_matrices_that_no_layer_covers_are_told_once(method):
    base, states, calibration, _ = case(Tokened(), "head", (5,))
    with pytest.warns(UserWarning, match="strange") as found:
        merged = method.merge(base, states, calibration)
    (message,) = [str(one.message) for one in found]
    assert message.startswith(
        "1 layers are merged by Average, without a look at their inputs: strange. Transposed is not"
    )
    mean = torch.stack([state["strange.weight"] for state in states.values()]).mean(0)
    torch.testing.assert_close(merged["strange.weight"], mean)


@pytest.mark.parametrize(
    "method",
    [
        RegMean(),
        RegMean(inputs="merged"),
        OutputProjection(basis="row", num_folds=2),
        OutputProjection(basis="row", num_folds=2, sweeps=2),
        OutputProjection(basis="task_global", mode="parallel"),
    ],
    ids=lambda method: method.__class__.__name__,
)
def test_some_of_the_samples_count_as_if_there_were_no_others(method):
    layers = nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 3)
    network = nn.Sequential(*layers)
    base, states, calibration, experts = case(network, "3", (5,))  # of 40, 43, 46 samples
    merged = replace(method, samples=42).merge(base, states, calibration)
    few = {
        task: calibration.inputs[task].take(torch.arange(min(n, 42)) * n // min(n, 42))
        for task, n in (("task0", 40), ("task1", 43), ("task2", 46))
    }
    expected = method.merge(base, states, calibration_of(experts, few, "3"))
    all_of_them = method.merge(base, states, calibration)
    for name, value in expected.items():
        assert torch.equal(merged[name], value), name
    assert any(not torch.equal(merged[name], value) for name, value in all_of_them.items())


@pytest.mark.parametrize("kind", [RegMean, OutputProjection])
def test_no_samples_are_refused(kind):
    with pytest.raises(ValueError, match="samples=0: expected at least 1, or null for all"):
        kind(samples=0)


@pytest.fixture
def pool(tmp_path):
    base = Classifier().model
    model = {"class_path": "tests.callbacks.project.Net", "init_args": {}}
    pool = ExpertPool.create(tmp_path / "pool", base, "net.9", model=model)
    for seed, task in enumerate(("one", "two")):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 30)[0])
    return pool


@pytest.mark.slow
def test_the_command_line_and_a_pool_give_what_python_gives(pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lightning-merge"])
    main(
        [
            *("merge", "--trainer.accelerator=cpu", "--trainer.devices=1"),
            *("--trainer.enable_progress_bar=false", "--correction=null"),
            *(f"--pool={pool.path}", f"--output={tmp_path / 'merged'}"),
            *("--method=OutputProjection", "--method.basis=row", "--method.lower=0"),
            '--method.heuristics=[{"class_path": "TaskArithmetic", "init_args": {"scale": 0.5}}]',
        ]
    )
    loaded = MergedModel.load(tmp_path / "merged")
    method = OutputProjection(basis="row", lower=0.0, heuristics=(TaskArithmetic(scale=0.5),))
    direct = merge_experts(pool, method, correction=None)
    ours, theirs = (split_state(model.network, "net.9")[0] for model in (loaded, direct))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    settings = loaded.record["method"]["init_args"]
    assert settings["heuristics"][0]["class_path"].endswith("TaskArithmetic")


def test_correction_regmean_and_full_give_one_answer_to_one_problem():
    """An identity layer before the head is a problem of all three."""
    from lightning_merge.correction import ClosedFormCorrection, CorrectionStatistics
    from lightning_merge.functional.projection import Quadratic
    from lightning_merge.functional.ridge import ridge_towards

    x, y = torch.randn(30, 5).double(), torch.randn(30, 5).double()
    statistics = CorrectionStatistics(5, 5)
    statistics.update(x, y)
    corrected = ClosedFormCorrection(
        {"task": statistics}, prior="identity", beta=1e-3, beta_mode="relative"
    ).solve({"task": 1.0})
    # The residual of an identity, its updates pulled to none.
    quadratic = Quadratic(
        gram=(x.T @ x)[None], cross=((y - x).T @ x)[None], energy=float((y - x).square().sum())
    )
    ridge = 1e-3 * float(quadratic.gram.diagonal(dim1=-2, dim2=-1).mean())
    zero = torch.zeros(1, 5, 5).double()
    update = ridge_towards(quadratic.cross, quadratic.gram, zero, ridge)[0]
    torch.testing.assert_close(
        torch.eye(5).double() + update, corrected.weight, rtol=1e-9, atol=1e-9
    )
    assert math.isclose(
        quadratic.objective(update[None]),
        statistics.total().error(corrected.weight),
        rel_tol=1e-8,
    )
