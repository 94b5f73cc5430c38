import math
import warnings
from collections.abc import Mapping, Sequence

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_merge import ExpertPool, MergedModel
from lightning_merge.callbacks import MergeCallback
from lightning_merge.methods import TIES
from lightning_merge.networks import split_state
from lightning_merge.states import fingerprint
from tests.callbacks.project import Classifier, Compiled, Net, Points, Whole, WithTeacher, samples


def trainer_of(tmp_path, *callbacks, **options):
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )


def callback(tmp_path, task="one", **options):
    options = {"head": "net.9", "network": "model", "num_calibration": 10} | options
    return MergeCallback(str(tmp_path / "pool"), task, **options)


def saving(tmp_path, **options):
    options = {"monitor": "val_loss", "filename": "{epoch}", "save_top_k": -1} | options
    return ModelCheckpoint(tmp_path / "checkpoints", **options)


def fit(tmp_path, *callbacks, module=None, data=None, ckpt_path=None, **options):
    trainer = trainer_of(tmp_path, *callbacks, **options)
    module = module or Classifier()
    trainer.fit(module, data or Points(), ckpt_path=ckpt_path)
    return trainer, module


def pool_of(tmp_path):
    return ExpertPool.open(tmp_path / "pool")


def assert_is(pool, task, network, head="net.9"):
    backbone, own = split_state(network, head)
    assert set(pool.expert(task)) == set(backbone)
    for name, value in pool.expert(task).items():
        assert torch.equal(value, backbone[name]), name
    for name, value in pool.head_state(task).items():
        assert torch.equal(value, own[name]), name


def filled(state, prefix="model."):
    net = Net()
    net.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return net


# what is recorded ---------------------------------------------------------------------------------


def test_base_expert_head_inputs_and_score_are_recorded(tmp_path):
    start = Classifier()
    trainer, module = fit(tmp_path, callback(tmp_path))
    pool = pool_of(tmp_path)
    backbone, _ = split_state(start.model, "net.9")
    assert all(torch.equal(pool.base[name], value) for name, value in backbone.items())
    assert set(pool.base) == set(backbone)
    assert pool.tasks == ["one"]
    assert_is(pool, "one", module.model)
    assert not torch.equal(pool.expert("one")["net.0.weight"], backbone["net.0.weight"])
    scores = pool.scores("one")
    assert scores.pop("fit/seconds") > 0
    assert scores == {"val_loss": float(trainer.callback_metrics["val_loss"])}
    # ten of the thirteen validation inputs, spread over them and without their labels
    rows = [position * 13 // 10 for position in range(10)]
    found = pool.calibration("one").tensors()
    assert torch.equal(found["inputs"], samples(100, 13)[0][rows])


def test_the_whole_module_may_be_the_network(tmp_path):
    _, module = fit(tmp_path, callback(tmp_path, network=None), module=Whole())
    assert_is(pool_of(tmp_path), "one", module)


def test_a_network_compiled_in_setup_has_its_own_names(tmp_path):
    best = saving(tmp_path)
    _, module = fit(
        tmp_path, callback(tmp_path), best, module=Compiled(), enable_checkpointing=True
    )
    assert "_orig_mod" in module.model._modules
    assert_is(pool_of(tmp_path), "one", module.model._orig_mod)


def test_the_module_is_left_as_it_was(tmp_path):
    _, plain = fit(tmp_path / "plain")
    _, module = fit(tmp_path, callback(tmp_path, tasks=["one", "two"]))
    _, module = fit(tmp_path, callback(tmp_path, "two", tasks=["one", "two"]))
    assert (tmp_path / "merged" / "merged.json").exists()
    for name, value in plain.state_dict().items():
        assert module.state_dict()[name].shape == value.shape
    assert module.training == plain.training
    assert not any(module.model.net[9]._forward_pre_hooks)
    assert module.trainer is not None


# which weights ------------------------------------------------------------------------------------


class Worse:
    """Says that every epoch is worse than the one before."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch + 1))


class WorseClassifier(Worse, Classifier):
    pass


class WorseWithTeacher(Worse, WithTeacher):
    pass


def worsening(tmp_path, *callbacks, **options):
    """Three epochs, of which the first is the best."""
    best = saving(tmp_path)
    trainer, module = fit(
        tmp_path,
        *callbacks,
        best,
        module=options.pop("module", None) or WorseClassifier(),
        max_epochs=3,
        enable_checkpointing=True,
        **options,
    )
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert not torch.equal(state["model.net.0.weight"], module.state_dict()["model.net.0.weight"])
    return trainer, module, best, state


@pytest.mark.parametrize("weights", ["auto", "best"])
def test_the_best_checkpoint_is_the_expert(tmp_path, weights):
    _, _, best, state = worsening(tmp_path, callback(tmp_path, weights=weights))
    pool = pool_of(tmp_path)
    assert_is(pool, "one", filled(state))
    assert pool.scores("one")["val_loss"] == float(best.best_model_score) == 1.0


def test_the_last_weights_where_they_are_asked_for(tmp_path):
    _, module, _, _ = worsening(tmp_path, callback(tmp_path, weights="last"))
    assert_is(pool_of(tmp_path), "one", module.model)
    assert pool_of(tmp_path).scores("one")["val_loss"] == 3.0


def test_the_last_weights_where_nothing_is_monitored(tmp_path):
    keep = saving(tmp_path, monitor=None, save_top_k=1)
    _, module = fit(tmp_path, callback(tmp_path), keep, max_epochs=2, enable_checkpointing=True)
    assert_is(pool_of(tmp_path), "one", module.model)


def test_a_teacher_of_the_same_names_is_not_mistaken_for_the_network(tmp_path):
    _, _, _, state = worsening(tmp_path, callback(tmp_path), module=WorseWithTeacher())
    assert_is(pool_of(tmp_path), "one", filled(state))


def test_best_without_a_monitoring_checkpoint_is_refused_at_the_start(tmp_path):
    module = Classifier()
    with pytest.raises(ValueError, match="weights='best' needs a ModelCheckpoint that monitors"):
        fit(tmp_path, callback(tmp_path, weights="best"), module=module)
    assert torch.equal(module.model.net[0].weight, Classifier().model.net[0].weight)
    assert not (tmp_path / "pool").exists()


AVERAGING = {
    "mean": lambda: WeightAveraging(use_buffers=True),
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "avg_fn": lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.5)),
}


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("weights", ["last", "best"])
def test_averaged_weights_are_the_expert(tmp_path, kind, order, weights):
    averaging, keep = AVERAGING[kind](), saving(tmp_path)
    ours = callback(tmp_path, weights=weights)
    both = [averaging, ours] if order == "before" else [ours, averaging]
    fit(tmp_path, *both, keep, max_epochs=2, enable_checkpointing=True)
    expected = averaging._average_model.module.model
    if weights == "best":
        expected = filled(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    assert_is(pool_of(tmp_path), "one", expected)
    raw = torch.load(keep.best_model_path, weights_only=True)["current_model_state"]
    assert not torch.equal(
        pool_of(tmp_path).expert("one")["net.0.weight"], raw["model.net.0.weight"]
    )


# the merge ----------------------------------------------------------------------------------------


def test_the_last_of_the_declared_tasks_merges(tmp_path):
    tasks = ["two", "three", "one"]
    for number, task in enumerate(sorted(tasks)):
        assert not (tmp_path / "merged").exists()
        method = {"class_path": "TIES", "init_args": {"density": 0.5}}
        options = {"tasks": tasks, "method": method, "correction": "paper"}
        fit(tmp_path, callback(tmp_path, task, **options), data=Points(number))
    merged = MergedModel.load(tmp_path / "merged", module=Net())
    assert merged.tasks == tasks
    assert merged.record["method"]["init_args"]["density"] == 0.5
    assert merged.record["calibration"] == dict.fromkeys(tasks, 10)
    assert (merged.options.beta, merged.options.prior) == (0.1, "svd")
    expected = TIES(density=0.5).merge(
        pool_of(tmp_path).base, {task: pool_of(tmp_path).expert(task) for task in tasks}
    )
    for name, value in split_state(merged.network, "net.9")[0].items():
        assert torch.equal(value, expected[name])
    x = torch.randn(4, 6)
    assert merged.with_preference({"two": 1.0}, "two")(x).shape == (4, 3)


def test_a_module_that_is_the_network_merges(tmp_path):
    for number, task in enumerate(["one", "two"]):
        ours = callback(tmp_path, task, network=None, tasks=["one", "two"], correction="none")
        fit(tmp_path, ours, module=Whole(), data=Points(number))
    merged = MergedModel.load(tmp_path / "merged", module=Whole())
    assert merged.statistics == {}
    assert merged.uncorrected("one")(torch.randn(2, 6)).shape == (2, 3)


def test_the_declared_model_makes_the_merged_model_load_by_itself(tmp_path):
    model = {"class_path": "tests.callbacks.project.Net", "init_args": {"classes": 3}}
    for number, task in enumerate(["one", "two"]):
        ours = callback(tmp_path, task, tasks=["one", "two"], model=model)
        fit(tmp_path, ours, data=Points(number))
    assert isinstance(MergedModel.load(tmp_path / "merged").network, Net)


def test_a_task_that_is_not_declared_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="'one' is none of those to merge: two, three"):
        fit(tmp_path, callback(tmp_path, tasks=["two", "three"]))


# what does not trigger it -------------------------------------------------------------------------


def test_dry_runs_and_other_stages_record_nothing(tmp_path):
    ours = callback(tmp_path)
    fit(tmp_path, ours, fast_dev_run=True)
    trainer, module = trainer_of(tmp_path, ours), Classifier()
    trainer.validate(module, Points(), verbose=False)
    trainer.test(module, Points(), verbose=False)
    trainer.predict(module, Points())
    assert not (tmp_path / "pool").exists()


class Broken(Classifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            raise RuntimeError("the power failed")


def test_an_interrupted_fit_records_nothing_and_can_be_resumed(tmp_path):
    keep = saving(tmp_path, monitor=None, save_last=True)
    with pytest.raises(RuntimeError, match="the power failed"):
        fit(
            tmp_path,
            callback(tmp_path),
            keep,
            module=Broken(),
            max_epochs=2,
            enable_checkpointing=True,
        )
    assert pool_of(tmp_path).tasks == []
    before = pool_of(tmp_path).fingerprint
    ours = callback(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="lightning.*")
        _, module = fit(
            tmp_path,
            ours,
            max_epochs=2,
            ckpt_path=keep.last_model_path,
            module=Classifier(),
        )
    pool = pool_of(tmp_path)
    assert pool.fingerprint == before == ours.state_dict()["trained_from"]
    assert_is(pool, "one", module.model)
    backbone, _ = split_state(Classifier().model, "net.9")
    assert fingerprint(backbone) == before


def test_a_fit_resumed_with_another_pool_is_refused(tmp_path):
    keep = saving(tmp_path, monitor=None)
    fit(tmp_path, callback(tmp_path), keep, enable_checkpointing=True)
    resumed = {"ckpt_path": keep.best_model_path, "max_epochs": 2}
    with pytest.raises(ValueError, match="already has an expert 'one'"):
        fit(tmp_path, callback(tmp_path), **resumed)
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=r"is resumed .* does not exist"):
        fit(tmp_path, callback(elsewhere), **resumed)
    ExpertPool.create(elsewhere / "pool", Classifier(seed=1).model, "net.9")
    with pytest.warns(UserWarning, match="written without this MergeCallback"):
        fit(tmp_path, callback(elsewhere), **resumed)


def test_a_replaced_pool_is_noticed_when_the_fit_resumes(tmp_path):
    keep = saving(tmp_path, monitor=None)
    fit(tmp_path, callback(tmp_path), keep, enable_checkpointing=True)
    (tmp_path / "pool").rename(tmp_path / "older")
    ExpertPool.create(tmp_path / "pool", Classifier(seed=1).model, "net.9")
    with pytest.raises(ValueError, match="started from another base"):
        fit(tmp_path, callback(tmp_path), ckpt_path=keep.best_model_path, max_epochs=2)


# refused before the training ----------------------------------------------------------------------


class Untrained(Classifier):
    def training_step(self, batch, batch_idx):
        raise AssertionError("the training has begun")


def test_a_duplicate_task_is_refused_before_the_training(tmp_path):
    fit(tmp_path, callback(tmp_path))
    with pytest.raises(ValueError, match=r"already has an expert 'one'.*overwrite=True"):
        fit(tmp_path, callback(tmp_path), module=Untrained())
    _, module = fit(tmp_path, callback(tmp_path, overwrite=True), data=Points(3))
    assert_is(pool_of(tmp_path), "one", module.model)


def test_another_base_is_refused_before_the_training(tmp_path):
    fit(tmp_path, callback(tmp_path))
    other = Untrained(seed=1)
    with pytest.raises(ValueError, match=r"holds another base \(fingerprint"):
        fit(tmp_path, callback(tmp_path, "two"), module=other)


BAD_START = {
    "path": ({"task": "../x"}, "task name '../x': expected letters"),
    "no task": ({"task": None}, "does not know the task"),
    "head": ({"head": "net.12"}, r"unknown path 'net.12'.*net\.9"),
    "no head": ({"head": None}, "Linear layers, last first: net.9"),
    "no linear": ({"head": "net.1"}, "no nn.Linear"),
    "network": ({"network": "backbone"}, "no submodule 'backbone', only 'model'"),
}


@pytest.mark.parametrize("name", BAD_START)
def test_bad_arguments_are_refused_before_the_training(tmp_path, name):
    options, message = BAD_START[name]
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, callback(tmp_path, **options), module=Untrained())
    assert not (tmp_path / "pool" / "experts").exists()


BAD_ARGUMENTS = {
    "method": ({"method": "Tyes"}, "method: "),
    "option": ({"method": {"class_path": "TIES", "init_args": {"densety": 0.1}}}, "densety"),
    "correction": ({"correction": {"bta": 0.1}}, "correction: "),
    "number": ({"num_calibration": 0}, "num_calibration must be at least 1"),
    "tasks": ({"tasks": ["one"]}, "at least two different tasks"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_when_it_is_made(tmp_path, name):
    options, message = BAD_ARGUMENTS[name]
    with pytest.raises(ValueError, match=message):
        callback(tmp_path, **options)


def test_weights_that_are_not_finite_are_not_recorded(tmp_path):
    with pytest.raises(ValueError, match=r"expert 'one'.*(NaN|finite)"):
        fit(tmp_path, callback(tmp_path), module=Classifier(lr=math.inf))
    assert pool_of(tmp_path).tasks == []


# plain data of any kind ---------------------------------------------------------------------------


class Config(Mapping):
    """A mapping that is no dict, as configuration libraries have them."""

    def __init__(self, **items):
        self._items = items

    def __getitem__(self, key):
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self):
        return len(self._items)


class Items(Sequence):
    def __init__(self, *items):
        self._items = items

    def __getitem__(self, index):
        return self._items[index]

    def __len__(self):
        return len(self._items)


def test_arguments_may_be_mappings_and_sequences_of_any_kind(tmp_path):
    path = "lightning_merge.methods.TIES"
    ours = callback(
        tmp_path,
        tasks=Items("one", "two"),
        inputs=Items("x"),
        method=Config(class_path=path, init_args=Config(density=0.25, exclude=Items("a.*"))),
        correction=Config(beta=0.3),
        model=Config(class_path="tests.callbacks.project.Net", init_args=Config(classes=3)),
    )
    assert ours.tasks == ["one", "two"]
    assert ours.inputs == ["x"]
    assert ours.method.density == 0.25
    assert ours.correction.beta == 0.3
    fit(tmp_path, ours)
    assert pool_of(tmp_path).model["init_args"] == {"classes": 3}


def test_the_state_is_plain_and_two_pools_may_be_filled_at_a_time(tmp_path):
    keep = saving(tmp_path, monitor=None)
    second = callback(tmp_path / "second")
    fit(tmp_path, callback(tmp_path), second, keep, enable_checkpointing=True)
    content = torch.load(keep.best_model_path, weights_only=True)["callbacks"]
    states = [state for key, state in content.items() if key.startswith("MergeCallback")]
    assert states == [{"trained_from": pool_of(tmp_path).fingerprint}] * 2
