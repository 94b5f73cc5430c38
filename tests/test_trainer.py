import json

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_merge import ExpertPool, MergedModel, merge_experts
from lightning_merge.loading import network_within
from lightning_merge.methods import TALLCompress, TaskArithmetic, TSVCompress
from lightning_merge.networks import split_state
from lightning_merge.trainer import MergeTrainer
from tests.callbacks.project import Classifier, Net, WithTeacher, samples
from tests.distributed.suite import Suite
from tests.networks import tuned

TASKS = ["one", "two", "three"]


def trainer_of(**options):
    options = {"logger": False, "enable_progress_bar": False} | options
    return MergeTrainer(accelerator="cpu", devices=1, enable_checkpointing=False, **options)


@pytest.fixture
def pool(tmp_path):
    base = Classifier().model
    model = {"class_path": "tests.callbacks.project.Net", "init_args": {}}
    pool = ExpertPool.create(tmp_path / "pool", base, "net.9", model=model)
    for seed, task in enumerate(TASKS):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 30)[0])
    return pool


@pytest.fixture
def merged(pool, tmp_path):
    merge_experts(pool).save(tmp_path / "merged")
    return tmp_path / "merged"


def test_merge_is_merge_experts_under_the_trainer(pool, tmp_path):
    method = TaskArithmetic(scale=0.4)
    trainer_of().merge(
        pool=str(pool.path), output=str(tmp_path / "m"), method=method, tasks=["three", "one"]
    )
    found = MergedModel.load(tmp_path / "m")
    expected = merge_experts(pool, method, tasks=["three", "one"])
    assert found.tasks == ["three", "one"]
    for name, value in split_state(expected.network, "net.9")[0].items():
        assert torch.equal(split_state(found.network, "net.9")[0][name], value)
    for task in found.tasks:
        for name, value in expected.statistics[task].tensors().items():
            assert torch.equal(found.statistics[task].tensors()[name], value)


@pytest.mark.parametrize("method", [TSVCompress(rank=2), TALLCompress(threshold=0.2)])
def test_compressed_experts_are_those_of_python(method, pool, tmp_path, capsys):
    options = {"pool": str(pool.path), "tasks": ["three", "one"]}
    trainer_of().compress(**options, output=str(tmp_path / "small"), method=method)
    experts = {task: pool.expert(task) for task in options["tasks"]}
    expected = method.save(tmp_path / "expected", pool.base, experts)
    found = type(expected)(tmp_path / "small")
    out = capsys.readouterr().out
    assert found.tasks == ("three", "one")
    for task in found.tasks:
        rebuilt, named = found.expert(task, pool.base), experts[task]
        for name, value in expected.expert(task, pool.base).items():
            assert torch.equal(rebuilt[name], value)
        lost, moved = (
            torch.cat([(state[n] - named[n]).flatten().double() for n in named]).norm()
            for state in (rebuilt, dict(pool.base))
        )
        assert found.error(task, pool.base, experts[task]) == pytest.approx(float(lost / moved))
        assert f"{task}: rebuilt with an error of {float(lost / moved):.3g}" in out
    assert "2 experts in " in out


class Recording(Suite):
    """Writes down what a stage asks of it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        assert self.trainer is not None
        self.calls.append("prepare_data")

    def setup(self, stage):
        super().setup(stage)
        self.calls.append(f"setup {stage}")

    def test_dataset(self, task):
        self.calls.append(task)
        return super().test_dataset(task)

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")


def test_a_sweep_prepares_the_data_writes_files_and_logs_its_rows(merged, tmp_path, capsys):
    data = Recording()
    logger = CSVLogger(tmp_path / "logs")
    trainer_of(logger=logger).sweep(
        datamodule=data, merged=str(merged), output=str(tmp_path / "sweep")
    )
    assert data.calls[:2] == ["prepare_data", "setup test"]
    assert data.calls[-1] == "teardown test"
    assert data.calls[2:-1] == [task for task in sorted(TASKS) for _ in range(3)]
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert names == {
        *("results.parquet", "results.csv", "summary.json", "front.png", "response.png"),
        *("ternary.png", "report.html"),
    }
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert set(summary["rows"]) >= {
        *("experts", "base", "uncorrected", "equal", "one_hot", "priority")
    }
    rows = pd.read_csv(f"{logger.log_dir}/metrics.csv")
    results = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    assert len(rows) > 50
    assert {f"preference/{task}" for task in TASKS} <= set(rows)
    assert rows["equal/raw_mean"][0] == pytest.approx(summary["rows"]["equal"]["raw_mean"])
    weights = rows[[f"preference/{task}" for task in summary["tasks"]]]
    assert weights.sum(axis=1).to_numpy() == pytest.approx(1.0)
    assert len(results) >= len(rows)
    assert "uncorrected" in capsys.readouterr().out


def test_progress_bars_appear(merged, tmp_path, capsys):
    trainer = trainer_of(enable_progress_bar=True, callbacks=[TQDMProgressBar()])
    trainer.merge(pool=str(tmp_path / "pool"), output=str(tmp_path / "again"))
    trainer.sweep(datamodule=Suite(), merged=str(merged), output=str(tmp_path / "sweep"))
    captured = capsys.readouterr()
    for text in ("Calibrating one", "Sweeping two", "three: experts", "one: base"):
        assert text in captured.err + captured.out


@pytest.mark.parametrize("task", [None, "two"])
def test_exported_weights_are_those_of_the_tailored_model(merged, tmp_path, task):
    preference = {"one": 0.25, "two": 0.75}
    trainer_of().export(
        merged=str(merged),
        output=str(tmp_path / "out.safetensors"),
        preference=preference,
        task=task,
    )
    state = load_file(tmp_path / "out.safetensors")
    model = MergedModel.load(merged)
    x = torch.randn(5, 6)
    if task is not None:
        network = Net()
        network.load_state_dict(state)
        torch.testing.assert_close(network(x), model.with_preference(preference, "two")(x))
    else:
        expected = model.with_preference(preference)
        loaded = model.with_preference({"three": 1.0})
        loaded.load_state_dict(state)
        for name, value in expected(x).items():
            torch.testing.assert_close(loaded(x)[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "two"])
def test_exported_programs_answer_as_the_tailored_model(merged, tmp_path, task):
    preference = {"one": 0.25, "two": 0.75}
    path = tmp_path / "out.pt2"
    trainer_of().export(
        merged=str(merged),
        output=str(path),
        preference=preference,
        task=task,
        format="torch_export",
    )
    program = torch.export.load(path).module()
    model = MergedModel.load(merged)
    expected = model.with_preference(preference) if task is None else None
    expected = expected or model.with_preference(preference, task)
    for size in (1, 5):  # the batch size is free
        x = torch.randn(size, 6)
        torch.testing.assert_close(program(x), expected(x))


@pytest.mark.slow
def test_an_exported_onnx_model_answers_as_the_tailored_model(merged, tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    path = tmp_path / "out.onnx"
    preference = {"one": 0.25, "two": 0.75}
    trainer_of().export(
        merged=str(merged), output=str(path), preference=preference, task="two", format="onnx"
    )
    session = runtime.InferenceSession(path.read_bytes())
    expected = MergedModel.load(merged).with_preference(preference, "two")
    for size in (1, 5):
        x = torch.randn(size, 6)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected(x), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_extra_names_the_extra(merged, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'onnxscript'")

    monkeypatch.setattr(torch.onnx, "export", missing)
    with pytest.raises(ValueError, match=r"pip install 'lightning-merge\[onnx\]'"):
        trainer_of().export(
            merged=str(merged),
            output=str(tmp_path / "out.onnx"),
            preference={"one": 1.0},
            task="one",
            format="onnx",
        )
    assert not (tmp_path / "out.onnx").exists()


class Wrapped(LightningModule):
    def __init__(self, module):
        super().__init__()
        self.anything = module


@pytest.mark.parametrize(
    "module", [Net(), Classifier(), Wrapped(Classifier()), torch.compile(Net(), backend="eager")]
)
def test_the_network_is_found_whatever_its_name(module):
    names = split_state(Net(), "net.9")[0]
    found = network_within(module, names, "net.9")
    assert type(found) is Net


def test_a_module_without_the_network_is_refused():
    assert network_within(None, ["x"], "net.9") is None
    assert type(network_within(WithTeacher(), split_state(Net(), "net.9")[0], "net.9")) is Net
    with pytest.raises(ValueError, match=r"no part of Linear has the backbone's 10 tensors"):
        network_within(torch.nn.Linear(2, 2), split_state(Net(), "net.9")[0], "net.9")


def test_mistakes_are_explained(merged, pool, tmp_path):
    trainer = trainer_of()
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match="sweep needs the tasks' test sets"):
        trainer.sweep(merged=str(merged), output=out)
    with pytest.raises(ValueError, match="does not exist, so .* is no merged model"):
        trainer.sweep(datamodule=Suite(), merged=str(tmp_path / "none"), output=out)
    with pytest.raises(ValueError, match="is no expert pool"):
        trainer.merge(pool=str(tmp_path / "none"), output=out)
    with pytest.raises(ValueError, match="unknown tasks \\['x'\\]"):
        trainer.merge(pool=str(pool.path), output=out, tasks=["one", "x"])
    with pytest.raises(KeyError, match="unknown task"):
        trainer.export(merged=str(merged), output=out, preference={"x": 1.0})
    base = Classifier().model
    experts = {task: tuned(base, seed) for seed, task in enumerate(TASKS)}
    inputs = {task: samples(0)[0] for task in TASKS}
    merge_experts(experts, None, inputs, base=base, head="net.9").save(tmp_path / "memory")
    with pytest.raises(ValueError, match="was merged from modules in memory.*--pool"):
        trainer.sweep(Classifier(), datamodule=Suite(), merged=str(tmp_path / "memory"), output=out)
    assert not (tmp_path / "out").exists()


def test_a_test_set_that_is_empty_is_refused(merged, tmp_path):
    class Empty(Suite):
        def dataloader(self, dataset):
            return DataLoader([], batch_size=2)

    with pytest.raises(ValueError, match="the test set is empty"):
        trainer_of().sweep(datamodule=Empty(), merged=str(merged), output=str(tmp_path / "out"))
