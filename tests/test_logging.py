import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_merge.logging import log_sweep
from lightning_merge.report import write_report
from tests.report.synthetic import make_sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder, result = tmp_path_factory.mktemp("sweep"), make_sweep(3, points=3)
    result.save(folder)
    write_report(result, folder)
    (folder / "interference.png").write_bytes((folder / "front.png").read_bytes())
    return result, folder


def test_csv_gets_metrics_and_the_files_beside_them(swept, tmp_path):
    result, folder = swept
    logger = CSVLogger(tmp_path)
    log_sweep([logger], result, folder)
    metrics = pd.read_csv(f"{logger.log_dir}/metrics.csv")
    assert len(metrics) == len(result.kinds)
    assert metrics["accuracy/mean"].to_numpy() == pytest.approx(result.raw.mean(1).numpy())
    expected = result.summary()["rows"]["equal"]["normalized_mean"]
    assert metrics["equal/normalized_mean"][0] == pytest.approx(expected)
    names = {path.name for path in (tmp_path / "lightning_logs/version_0/sweep").iterdir()}
    assert names >= {"front.png", "interference.png", "results.csv", "summary.json"}


def test_tensorboard_gets_pictures_table_and_hyperparameters(swept, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result, folder = swept
    logger = TensorBoardLogger(tmp_path)
    log_sweep([logger], result, folder)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert {f"sweep/{n}" for n in ("front", "response", "ternary", "interference")} <= set(
        tags["images"]
    )
    image = events.Images("sweep/front")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 100
    text = events.Tensors("sweep/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "corrected, one-hot" in text
    assert len(events.Scalars("accuracy/latin")) == len(result.kinds)
    assert events.Scalars("equal/normalized_mean")[-1].value > 0
    assert "method" in (tmp_path / "lightning_logs/version_0/hparams.yaml").read_text()


class Pictures(Logger):
    """Takes what Weights & Biases takes, by the names of its Lightning logger."""

    name, version = "pictures", 0

    def __init__(self):
        self.images, self.tables, self.metrics = {}, {}, []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        raise AssertionError

    def log_image(self, key, images, step=None, **kwargs):
        self.images[key] = images

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.tables[key] = dataframe


def test_a_logger_of_pictures_gets_pictures_and_the_table(swept):
    result, folder = swept
    logger = Pictures()
    log_sweep([logger], result, folder)
    assert set(logger.images) >= {"sweep/front", "sweep/response", "sweep/interference"}
    assert logger.images["sweep/front"] == [str(folder / "front.png")]
    pd.testing.assert_frame_equal(logger.tables["sweep/results"], result.table())
    assert [step for step, _ in logger.metrics] == list(range(len(result.kinds)))
    references = dict(result.references) | {"experts": torch.zeros(3)}
    log_sweep([logger], make_sweep(3, points=3, references=references), folder)
    assert "equal/normalized_mean" not in logger.metrics[-len(result.kinds)][1]


def test_the_logger_of_wandb_takes_them_by_these_names():
    import inspect

    from lightning.pytorch.loggers import WandbLogger

    assert {"key", "images"} <= set(inspect.signature(WandbLogger.log_image).parameters)
    assert {"key", "dataframe"} <= set(inspect.signature(WandbLogger.log_table).parameters)
