"""AdaMerging: killed runs, coefficients on disk, bad input, labels, and a merge end to end."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.utils.data import DataLoader

from lightning_merge import MergedModel, merge_experts
from lightning_merge.calibration import CalibrationInputs
from lightning_merge.callbacks import MergeCallback
from lightning_merge.methods import TIES, AdaMerging, MergeMethod, TaskArithmetic, TSVMerge
from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.methods.adaptation.learner import Learner
from lightning_merge.networks import split_state
from tests.callbacks.project import Classifier, Net, Points
from tests.callbacks.test_merge import fit
from tests.methods.calibrated import setting
from tests.networks import make, tuned

RUN = dict(steps=7, batch_size=4, lr=0.02, patience=None)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_a_killed_run_continues_to_the_last_bit(tmp_path, monkeypatch, kind):
    base, experts, calibration = setting(kind, samples=9)
    options = {**RUN, "bn_every": 3}
    whole = AdaMerging(**options).learn(base, experts, calibration)
    resumable = AdaMerging(**options, state_path=str(tmp_path / "state"), save_every=2)
    original = Learner.sums

    def killed(self, step):
        if step == 5:
            raise Killed
        return original(self, step)

    monkeypatch.setattr(Learner, "sums", killed)
    with pytest.raises(Killed):
        resumable.learn(base, experts, calibration)
    seen = []
    monkeypatch.setattr(Learner, "sums", lambda self, s: (seen.append(s), original(self, s))[1])
    found = resumable.learn(base, experts, calibration)
    assert seen == [4, 5, 6]
    assert torch.equal(found.values, whole.values)
    for name, series in whole.history.items():
        assert torch.equal(found.history[name], series), name
    again = resumable.learn(base, experts, calibration)  # finished: nothing is done
    assert seen == [4, 5, 6]
    assert torch.equal(again.values, whole.values)
    assert (tmp_path / "state").stat().st_size < 2**20


def test_the_state_of_another_run_is_refused(tmp_path):
    base, experts, calibration = setting()
    method = AdaMerging(**RUN, state_path=str(tmp_path / "state"))
    method.learn(base, experts, calibration)
    with pytest.raises(ValueError, match="state is the state of another run"):
        replace(method, lr=0.5).learn(base, experts, calibration)
    other = {
        t: CalibrationInputs.collect(x[slice(None)] + 1) for t, x in calibration.inputs.items()
    }
    with pytest.raises(ValueError, match="calibration inputs differ"):
        method.learn(base, experts, replace(calibration, inputs=other))
    longer = replace(method, steps=9).learn(base, experts, calibration)
    assert len(longer.history["loss"]) == 9


def test_coefficients_are_saved_and_used_again(tmp_path):
    base, experts, calibration = setting(samples=9)
    method = AdaMerging(**RUN, save=str(tmp_path / "kept"), protocol="transductive")
    merged = method.merge(base, experts, calibration)
    saved = LearnedCoefficients.load(tmp_path / "kept")
    assert saved.values.shape == (len(saved.groups), 3)
    assert saved.history["entropy"].shape == (7, 3)
    record = saved.record
    assert (record["protocol"], record["steps"]) == ("transductive", 7)
    assert record["method"]["seed"] == 0
    assert set(record["data"]) == set(record["experts"]) == set(experts)
    again = AdaMerging(coefficients=str(tmp_path / "kept"))
    turned = dict(reversed(experts.items()))
    for given in (experts, turned):
        found = again.merge(base, given, calibration)
        for name in base:
            torch.testing.assert_close(found[name], merged[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="groups without a use: .* missing: all"):
        replace(again, granularity="task").merge(base, experts, calibration)
    two = {t: experts[t] for t in ("task0", "task1")}
    with pytest.raises(ValueError, match="tasks without a use: task2"):
        again.merge(base, two, calibration)
    with pytest.raises(ValueError, match="other task vectors: vectors 'plain', here 'ties'"):
        replace(again, vectors="ties").merge(base, experts, calibration)
    with pytest.raises(ValueError, match="other task vectors: start None, here"):
        replace(again, start=TSVMerge()).merge(base, experts, calibration)
    saved.save(tmp_path / "other")
    wrong = replace(saved, values=saved.values[:, :2])
    wrong.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"of shape \(10, 3\) \(groups, tasks\), found \(10, 2\)"):
        LearnedCoefficients.load(tmp_path / "other")
    (tmp_path / "other" / "coefficients.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable AdaMerging coefficients manifest"):
        LearnedCoefficients.load(tmp_path / "other")
    with pytest.raises(ValueError, match="does not exist"):
        LearnedCoefficients.load(tmp_path / "nowhere")


def test_coefficients_bring_their_protocol_and_need_no_inputs(tmp_path):
    network, head, shape = make("mlp")
    experts = {task: tuned(network, seed) for seed, task in enumerate("abc")}
    inputs = {task: torch.randn(9, *shape) for task in experts}
    options = dict(base=network, head=head, correction=None, report="off")
    method = AdaMerging(**RUN, save=str(tmp_path / "kept"), protocol="transductive")
    first = merge_experts(experts, method, inputs, **options)
    again = merge_experts(experts, AdaMerging(coefficients=str(tmp_path / "kept")), **options)
    assert again.record["calibration"] == {}
    for name, value in first.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value)
    again.save(tmp_path / "merged")
    manifest = json.loads((tmp_path / "merged" / "merged.json").read_text())
    assert manifest["record"]["method"]["init_args"]["protocol"] == "transductive"
    assert "| protocol | `transductive` |" in (tmp_path / "merged" / "README.md").read_text()
    with pytest.raises(ValueError, match="no calibration inputs for a, b, c, which the method Ada"):
        merge_experts(experts, AdaMerging(**RUN), **options)


def test_coefficients_of_a_record_without_a_protocol_keep_the_given_one(tmp_path):
    base, experts, calibration = setting()
    AdaMerging(**RUN, save=str(tmp_path)).merge(base, experts, calibration)
    saved = LearnedCoefficients.load(tmp_path)
    replace(saved, record={}).save(tmp_path)
    again = AdaMerging(coefficients=str(tmp_path), protocol="transductive")
    found = again.outcome(base, experts, replace(calibration, inputs={}))
    assert found.method.protocol == "transductive"


def test_collapse_is_noticed():
    marginal = torch.tensor([[1.0, 1.0], [0.9, 1.0], [0.3, 0.9]])
    learned = LearnedCoefficients(
        values=torch.zeros(1, 2),
        groups=("all",),
        tasks=("a", "b"),
        history={"marginal_entropy": marginal},
    )
    assert learned.collapsed() == ["a"]
    assert replace(learned, history={}).collapsed() == []


def test_early_stop():
    base, experts, calibration = setting(samples=8)
    # at its bounds the loss on the one batch there is stays what it is
    method = AdaMerging(steps=60, batch_size=8, lr=0.5, patience=5, bounds=(0.29, 0.31))
    steps = len(method.learn(base, experts, calibration).history["loss"])
    assert 5 < steps < 60


@pytest.mark.parametrize(("bad", "lr"), [(2, 0.02), (4, 0.01)])
def test_steps_without_a_finite_loss_are_skipped(monkeypatch, bad, lr):
    base, experts, calibration = setting()
    original = Learner.sums

    def sums(self, step):
        found = original(self, step)
        if 2 <= step < 2 + bad:
            found.gradient[0, 0] = float("nan")
        return found

    monkeypatch.setattr(Learner, "sums", sums)
    learned = AdaMerging(**RUN).learn(base, experts, calibration)
    assert bool(torch.isfinite(learned.values).all())
    assert int(learned.history["loss"].isnan().sum()) == bad
    assert learned.record["lr"] == lr
    spread = learned.history["coefficients"]
    assert torch.equal(spread[2], spread[3])


def test_ten_in_a_row_end_the_run(monkeypatch):
    base, experts, calibration = setting()
    original = Learner.sums

    def sums(self, step):
        found = original(self, step)
        found.loss[0] = float("inf")
        return found

    monkeypatch.setattr(Learner, "sums", sums)
    with pytest.raises(ValueError, match="10 steps in a row had no finite loss"):
        AdaMerging(**{**RUN, "steps": 30}).learn(base, experts, calibration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 20.0}, r"density must lie in \(0, 1\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"max_images_per_forward": 0}, "max_images_per_forward must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"steps": -1}, "steps must not be negative"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"init": float("nan")}, "init must be a finite number"),
        ({"bounds": (1.0, 0.0)}, "a smaller and a larger number"),
        ({"storage": "stream", "vectors": "ties"}, "storage='exact', 'bfloat16' or 'float16'"),
    ],
)
def test_bad_hyper_parameters(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaMerging(**arguments)


def test_bad_input():
    base, experts, calibration = setting()
    method = AdaMerging(**RUN)
    with pytest.raises(ValueError, match="no experts"):
        method.merge(base, {}, calibration)
    with pytest.raises(ValueError, match="no calibration inputs for task0.* which AdaMerging"):
        method.merge(base, experts, replace(calibration, inputs={}))
    short = {t: {n: v for n, v in e.items() if n != "net.2.bias"} for t, e in experts.items()}
    with pytest.raises(ValueError, match="expert 'task0': 1 parameters missing: net.2.bias"):
        method.merge(base, short, calibration)
    broken = dict(calibration.inputs)
    images = torch.zeros(20, 6)
    images[3, 2] = float("nan")
    broken["task1"] = CalibrationInputs.collect(images)
    with pytest.raises(ValueError, match="'task1': calibration input 'inputs' holds NaN"):
        method.merge(base, experts, replace(calibration, inputs=broken))
    for storage in ("exact", "stream"):
        diverged = {t: dict(e) for t, e in experts.items()}
        diverged["task2"]["net.0.bias"] = torch.full((8,), float("inf"))
        with pytest.raises(ValueError, match="expert 'task2': parameter 'net.0.bias' holds 8"):
            replace(method, storage=storage).merge(base, diverged, calibration)
    with pytest.raises(ValueError, match="the head of 'task1' has 1 class: "):
        method.merge(*setting(classes=(3, 1, 2)))
    with pytest.warns(UserWarning, match=r"fewer calibration inputs .* of 64, .* task0 \(20\)"):
        replace(method, batch_size=64).merge(base, experts, calibration)


def test_a_shared_head_is_refused():
    base, experts, calibration = setting()
    whole = {**base, "net.9.weight": torch.ones(3, 8)}
    with pytest.raises(ValueError, match="the base holds 1 tensors of the head 'net.9'"):
        AdaMerging(**RUN).merge(
            whole, {t: {**e, "net.9.weight": torch.ones(3, 8)} for t, e in experts.items()},
            calibration,
        )  # fmt: skip


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 4)
        self.counter = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x))


def test_parameters_of_integers_are_refused():
    _, _, calibration = setting()
    network = Counting()
    base = split_state(network, "head")[0]
    counting = replace(calibration, network=lambda task: Counting(), head="head")
    with pytest.raises(ValueError, match="1 parameters hold integers .* counter"):
        AdaMerging(**RUN).merge(base, {"task0": base}, counting)


# labels -------------------------------------------------------------------------------------------


class Poison:
    """A label that must not be touched."""

    def __getattribute__(self, name):
        if name == "__class__":
            return object.__getattribute__(self, name)
        raise AssertionError(f"a label was read: {name}")


class Unlabeled(Classifier):
    def validation_step(self, batch, batch_idx):
        pass


class Data(Points):
    def __init__(self, seed, label):
        super().__init__(seed)
        self.label = label

    def val_dataloader(self):
        dataset = self.dataset(self.seed + 100, self.val_count)
        return DataLoader(dataset, batch_size=5, collate_fn=self.collate)

    def collate(self, items):
        x = torch.stack([item[0] for item in items])
        labels = torch.stack([item[1] for item in items])
        return x, {"true": labels, "turned": labels.flip(0), "poison": Poison()}[self.label]


def merged_by_callback(folder, label):
    for seed, task in enumerate(("one", "two")):
        record = MergeCallback(
            str(folder / "pool"), task, head="net.9", network="model", calibration="val",
            tasks=["one", "two"], correction="none",
            method={"class_path": "lightning_merge.methods.AdaMerging", "init_args": RUN},
        )  # fmt: skip
        fit(folder, record, module=Unlabeled(lr=0.01 if seed else 0.05), data=Data(seed, label))
    return MergedModel.load(folder / "merged", module=Net())


def test_labels_are_never_read(tmp_path):
    digests = set()
    for label in ("true", "turned", "poison"):
        torch.manual_seed(0)
        model = merged_by_callback(tmp_path / label, label)
        assert model.record["method"]["init_args"]["protocol"] == "inductive"
        state = split_state(model.network, "net.9")[0]
        values = b"".join(v.contiguous().numpy().tobytes() for _, v in sorted(state.items()))
        digests.add(hashlib.sha256(values).hexdigest())
    assert len(digests) == 1


# from outside -------------------------------------------------------------------------------------


def test_through_merge_experts_with_a_start():
    base, head, shape = make("vit")
    experts = {f"t{i}": tuned(base, i) for i in range(3)}
    inputs = {task: torch.randn(12, *shape) for task in experts}
    method = AdaMerging(**RUN, start=TIES(density=0.5), bounds=(-1.0, 1.0))
    model = merge_experts(experts, method, inputs, base=base, head=head)
    start = model.record["method"]["init_args"]["start"]
    assert start["class_path"] == "lightning_merge.methods.ties.TIES"
    assert start["init_args"]["density"] == 0.5
    json.dumps(model.record["method"])


def test_from_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MergeMethod, "method")
    found = parser.parse_args(
        ["--method", "AdaMerging", "--method.steps", "300", "--method.vectors", "ties",
         "--method.start", "TIES", "--method.start.density", "0.5", "--method.bounds", "[0, 1]"]
    )  # fmt: skip
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    expected = AdaMerging(steps=300, vectors="ties", start=TIES(density=0.5), bounds=(0.0, 1.0))
    assert instantiate(found).method == expected


# end to end ---------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU())
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.body(x))


def points(task, split, count=200):
    """Four clusters a task, in directions of its own."""
    centres = 2.0 * torch.randn(4, 8, generator=torch.Generator().manual_seed(task))
    generator = torch.Generator().manual_seed(100 * task + split + 7)
    labels = torch.arange(count) % 4
    return centres[labels] + torch.randn(count, 8, generator=generator), labels


def trained(network, x, y, steps=150):
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


def test_layer_wise_is_better_than_task_arithmetic():
    gains = {}
    for seed in range(2):
        torch.manual_seed(seed)
        base = trained(Small(), *points(50, 0))
        experts = {}
        for task in range(3):
            expert = Small()
            expert.load_state_dict(base.state_dict())
            experts[f"t{task}"] = trained(expert, *points(10 * seed + task, 0))
        inputs = {f"t{task}": points(10 * seed + task, 1)[0] for task in range(3)}
        method = AdaMerging(steps=120, lr=5e-3, patience=None, normalize=True)
        scores = []
        for chosen in (TaskArithmetic(scale=0.3), method):
            model = merge_experts(experts, chosen, inputs, base=base, head="head", correction=None)
            scores.append([])
            for task in range(3):
                x, labels = points(10 * seed + task, 2)
                with torch.no_grad():
                    answer = model.uncorrected(f"t{task}")(x)
                scores[-1].append(float((answer.argmax(1) == labels).double().mean()))
        for task, (before, after) in enumerate(zip(*scores, strict=True)):
            gains.setdefault(task, []).append(after - before)
    means = [sum(values) / len(values) for values in gains.values()]
    assert sum(means) / len(means) > -0.005
    assert max(means) > 0.02
