"""What methods that look at data found, in the folder of the merged model and after reading it."""

import json

import pytest
import torch

from lightning_merge import MergedModel, merge_experts
from lightning_merge.callbacks import MergeCallback
from lightning_merge.cli import main
from lightning_merge.merging import calibration_for
from lightning_merge.methods import (
    AdaMerging,
    CalibratedMethod,
    Fisher,
    GreedySoup,
    OutputProjection,
    RegMean,
    TaskArithmetic,
)
from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.pool import ExpertPool
from lightning_merge.report import merge_pictures
from lightning_merge.runtime import PeakMemory
from tests.callbacks.project import Classifier, Net, Points, samples
from tests.callbacks.test_merge import fit
from tests.networks import make, tuned

LEARN = {"steps": 4, "batch_size": 4, "lr": 0.02}


def merged_by(method, kind="mlp", inputs=None, report="brief", **options):
    """A merged model, and what it was merged from."""
    torch.manual_seed(0)
    network, head, shape = make(kind)
    experts = {task: tuned(network, seed, 0.2) for seed, task in enumerate("abc")}
    inputs = inputs or {task: torch.randn(10, *shape) for task in experts}
    given = {"base": network, "head": head}
    model = merge_experts(experts, method, inputs, correction=None, report=report, **given)
    return model, calibration_for(experts, inputs, **given)


def saved(model, folder):
    """The manifest and the files of a model's folder."""
    model.save(folder, pictures=merge_pictures(model.report, model.files))
    return json.loads((folder / "merged.json").read_text())


def test_coefficients_and_their_picture_lie_in_the_folder(tmp_path):
    model, given = merged_by(AdaMerging(**LEARN))
    manifest = saved(model, tmp_path / "m")
    assert manifest["files"] == ["coefficients.safetensors", "coefficients.json"]
    found = LearnedCoefficients.load(tmp_path / "m")
    expected = AdaMerging(**LEARN).learn(given.base, given.experts, given.calibration)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.history["entropy"], expected.history["entropy"])
    told = manifest["merge"]["found"]
    assert (told["protocol"], told["steps"], told["groups"]) == ("inductive", 4, 10)
    assert told["coefficients"]["b"]["mean"] == pytest.approx(
        float(expected.values[:, 1].mean()), rel=1e-4
    )
    # what this process holds: torch alone is more than a megabyte
    assert 2**20 < told["peak_memory"] == found.record["peak_memory"]
    assert (tmp_path / "m" / "coefficients.png").read_bytes()[1:4] == b"PNG"
    card = (tmp_path / "m" / "README.md").read_text()
    found, interference = card.split("## What the method found")[1].split("## How the experts")
    assert "| steps | `4` |" in found
    assert "![coefficients](coefficients.png)" in found
    assert "![interference](interference.png)" in interference
    # The folder itself is what coefficients are used again from, with their history.
    again, _ = merged_by(AdaMerging(coefficients=str(tmp_path / "m")))
    for name, value in model.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value)
    entropy = again.files["coefficients.safetensors"]["history/entropy"]
    assert torch.equal(entropy, expected.history["entropy"])


def test_the_history_turns_with_the_tasks():
    history = {"entropy": torch.tensor([[1.0, 2.0]]), "loss": torch.tensor([3.0])}
    learned = LearnedCoefficients(
        values=torch.tensor([[0.1, 0.2]]), groups=("all",), tasks=("a", "b"), history=history
    )
    turned = learned.fitted(("all",), ("b", "a"))
    assert turned.history["entropy"].tolist() == [[2.0, 1.0]]
    assert turned.history["loss"].tolist() == [3.0]


def test_members_and_trials_of_a_soup_are_in_the_manifest(tmp_path):
    model, given = merged_by(GreedySoup())
    told = saved(model, tmp_path / "m")["merge"]["found"]
    method = GreedySoup()
    score = method.score(tuple(given.experts), given.calibration)
    soup = method.soup(given.base, given.experts, score)
    assert told["members"] == soup.members
    assert [(t["expert"], t["added"]) for t in told["trace"]] == [(t, a) for t, _, a in soup.trace]
    assert [t["score"] for t in told["trace"]] == pytest.approx([s for _, s, _ in soup.trace])
    assert told["scores"] == pytest.approx(soup.scores, rel=1e-4)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_reports_of_layers_lie_in_the_folder(tmp_path, mode):
    method = OutputProjection(
        mode=mode, basis="task", ridge="auto", num_folds=3, heuristics=(TaskArithmetic(),)
    )
    model, given = merged_by(method)
    manifest = saved(model, tmp_path / "m")
    _, reports = method.project(given.base, given.experts, given.calibration)
    rows = json.loads((tmp_path / "m" / "layers.json").read_text())["layers"]
    assert [row["name"] for row in rows] == [report.name for report in reports]
    for row, report in zip(rows, reports, strict=True):
        assert row["kept"] == report.kept
        assert row["coefficients"] == pytest.approx(report.coefficients, rel=1e-4)
        for name in ("captured", "held_out", "ridge"):
            assert row[name] == pytest.approx(getattr(report, name), rel=1e-4)
    told = manifest["merge"]["found"]
    assert sum(told["layers"].values()) == len(reports)
    captured = sorted(report.captured for report in reports)
    assert told["median_captured"] == pytest.approx(captured[len(captured) // 2], rel=1e-4)


@pytest.mark.parametrize("inputs", ["expert", "merged"])
def test_regmean_tells_what_it_captured(tmp_path, inputs):
    model, _ = merged_by(RegMean(inputs=inputs, ridge=0.0))
    saved(model, tmp_path / "m")
    rows = json.loads((tmp_path / "m" / "layers.json").read_text())["layers"]
    assert [row["name"] for row in rows] == [f"net.{n}" for n in (0, 2, 4, 6, 8)]
    for row in rows:  # the minimum of its objective, which the average is no less than
        assert 0 <= row["heuristics"]["fallback"] <= row["captured"] + 1e-6 <= 1 + 1e-6
        assert row["held_out"] is None


def test_nothing_to_capture_is_null_and_the_layer_is_the_base():
    torch.manual_seed(0)
    network, head, shape = make("mlp")
    experts = dict.fromkeys("ab", network)
    inputs = {task: torch.randn(8, *shape) for task in experts}
    with pytest.warns(UserWarning, match="no expert differs"):
        model = merge_experts(
            experts, OutputProjection(num_folds=None), inputs, base=network, head=head,
            correction=None,
        )  # fmt: skip
    json.dumps(model.files["layers.json"], allow_nan=False)
    assert model.report["found"]["layers"] == {"base": 5}
    assert model.report["found"]["median_captured"] is None
    assert model.report["fallback"]["base"]["parameters"] == 10


def parameters_in(fallback):
    return {kind: (found["parameters"], found["names"]) for kind, found in fallback.items()}


def test_what_a_method_with_data_left_out_is_in_the_manifest():
    biases = [f"net.{n}.bias" for n in (0, 2, 4, 6, 8)]
    model, _ = merged_by(RegMean())
    assert parameters_in(model.report["fallback"]) == {"average": (5, biases)}
    left = merged_by(RegMean(), "vit")[0].report["found"]["left"]
    assert left["norm layers are not asked for"]["names"][0] == "blocks.0.norm1"
    kept = OutputProjection(layers=("norm",), num_folds=None, fallback=TaskArithmetic())
    model, _ = merged_by(kept)
    assert parameters_in(model.report["fallback"])["fallback"][0] == 10
    for method in (Fisher(samples=4), AdaMerging(**LEARN), GreedySoup(samples=4)):
        model, given = merged_by(method, "resnet")
        found = parameters_in(model.report["fallback"])
        counters = [name for name in given.base if name.endswith("num_batches_tracked")]
        assert found["base"][0] == len(counters)
        statistics = [name for name in given.base if "running" in name]
        if isinstance(method, GreedySoup):  # statistics are those of the members
            assert set(found) == {"base"}
        else:
            assert found["average"][0] == len(statistics)


def test_the_peak_of_memory_is_that_since_it_was_asked_for():
    torch.zeros(2**26).add_(1)  # 256 MiB: what was held before does not count
    memory = PeakMemory()
    start = memory.bytes
    held = torch.ones(2**24)  # 64 MiB
    memory.note()
    peak = memory.bytes
    del held
    assert 60 * 2**20 < peak - start < 120 * 2**20
    memory.note()
    assert memory.bytes == peak


class Silent(CalibratedMethod):
    """A method of a user that gives nothing but weights."""

    def merge(self, base, experts, calibration):
        return {name: value.clone() for name, value in base.items()}


def test_a_method_that_tells_nothing_leaves_the_manifest_as_it_was(tmp_path):
    model, _ = merged_by(Silent())
    manifest = saved(model, tmp_path / "m")
    assert manifest["files"] == []
    assert "found" not in manifest["merge"]
    assert manifest["merge"]["fallback"] == {}


@pytest.mark.parametrize("report", ["brief", "off"])
def test_files_are_kept_by_a_model_that_is_read_and_written_again(tmp_path, report):
    model, _ = merged_by(AdaMerging(**LEARN), report=report)
    first = saved(model, tmp_path / "m")
    assert (tmp_path / "m" / "interference.png").exists() == (report == "brief")
    loaded = MergedModel.load(tmp_path / "m", module=make("mlp")[0])
    assert saved(loaded, tmp_path / "again") == first
    for name in first["files"]:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / "coefficients.json").write_text("{")
    with pytest.raises(ValueError, match=r"coefficients\.json is missing or not readable"):
        MergedModel.load(tmp_path / "m", module=make("mlp")[0])
    manifest = tmp_path / "again" / "merged.json"  # of a release before
    manifest.write_text(json.dumps({k: v for k, v in first.items() if k != "files"}))
    assert MergedModel.load(tmp_path / "again", module=make("mlp")[0]).files == {}


def test_the_callback_and_the_command_line_write_them(tmp_path, monkeypatch):
    method = {"class_path": "lightning_merge.methods.AdaMerging", "init_args": LEARN}
    for seed, task in enumerate(("one", "two")):
        record = MergeCallback(
            str(tmp_path / "pool"), task, head="net.9", network="model", calibration="val",
            tasks=["one", "two"], correction="none", method=method,
        )  # fmt: skip
        fit(tmp_path, record, data=Points(seed))
    assert (tmp_path / "merged" / "coefficients.png").exists()
    assert LearnedCoefficients.load(tmp_path / "merged").tasks == ("one", "two")
    model = {"class_path": "tests.callbacks.project.Net", "init_args": {}}
    base = Classifier().model
    pool = ExpertPool.create(tmp_path / "other", base, "net.9", model=model)
    for seed, task in enumerate(("one", "two")):
        pool.add(task, tuned(base, seed), calibration=samples(seed, 30)[0])
    monkeypatch.setattr("sys.argv", ["lightning-merge"])
    main(
        [
            *("merge", "--trainer.accelerator=cpu", "--trainer.devices=1", "--correction=null"),
            *("--trainer.enable_progress_bar=false", f"--pool={pool.path}", "--report=off"),
            *(f"--output={tmp_path / 'out'}", "--method=AdaMerging", "--method.steps=3"),
        ]
    )
    assert (tmp_path / "out" / "coefficients.png").exists()
    assert LearnedCoefficients.load(tmp_path / "out").record["steps"] == 3
    assert isinstance(MergedModel.load(tmp_path / "out").network, Net)
