"""Suites of small experts to measure on: four kinds of networks, trained once and kept.

``python -m benchmarks.suites`` trains them all into ``runs/bench`` (one CPU thread, a few minutes).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import timm
import torch
from sklearn import datasets, preprocessing
from torch import Tensor, nn

from lightning_merge import ExpertPool
from lightning_merge.data import GlyphTask
from lightning_merge.data.real import digits, mnist, textures
from lightning_merge.files import write_tensors
from lightning_merge.modules import OneCycle
from lightning_merge.modules.base_checkpoint import load_base
from lightning_merge.networks import load_backbone, set_submodule, split_state
from lightning_merge.states import LazyStateDict

ROOT = Path("runs/bench")
Split = tuple[Tensor, Tensor]
"""Inputs and labels."""
SCRIPTS = ("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "math")


@dataclass(frozen=True)
class TaskData:
    """Tensors of one task."""

    train: Split
    test: Split
    calibration: Tensor

    @property
    def classes(self) -> int:
        return int(self.train[1].max()) + 1


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What experts are made of: a network, a base and tasks."""

    network: Callable[[], nn.Module]
    """A network whose head is replaced for every task."""
    head: str
    base: Callable[[], Split]
    """Data that the base is pre-trained on."""
    base_epochs: int
    tasks: Callable[[int], dict[str, TaskData]]
    """Tasks by name; the seed draws samples where there are more than enough."""
    epochs: int
    lr: float = 1e-3
    checkpoint: Path | None = None
    """A base of the same recipe, taken if it is there."""


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A suite with its trained experts."""

    pool: ExpertPool
    tasks: Mapping[str, TaskData]
    template: nn.Module


class TableTransformer(nn.Module):
    """A transformer whose tokens are the columns of a table: 16 numbers each row."""

    def __init__(self, classes: int = 8, dim: int = 64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(16, dim) * 0.5)
        self.column = nn.Parameter(torch.randn(16, dim) * 0.1)
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of rows (n, 16)."""
        tokens = torch.tanh(x[..., None] * self.scale) + self.column
        return self.head(self.norm(self.encoder(tokens).mean(1)))


def convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto",
        in_chans=1,
        num_classes=1,
        depths=(1, 1, 2, 1),
        dims=(24, 48, 96, 192),
        patch_size=2,
        kernel_sizes=3,
        conv_mlp=False,
    )


def vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        in_chans=1,
        num_classes=1,
        embed_dim=96,
        depth=4,
        num_heads=4,
    )


def resnet() -> nn.Module:
    return timm.create_model(
        "resnet10t", in_chans=1, num_classes=1, channels=(16, 32, 64, 128), stem_width=16
    )


def glyphs(script: str, strength: float, train: int = 2000, calibration: int = 2000) -> TaskData:
    task = GlyphTask(script, strength=strength, train_size=train, calibration_size=calibration)
    train_images, test_images = task.train(), task.test()
    assert train_images.labels is not None
    assert test_images.labels is not None
    return TaskData(
        (_scaled(train_images.images), train_images.labels),
        (_scaled(test_images.images), test_images.labels),
        _scaled(task.calibration().images),
    )


def base_glyphs(size: int, strength: float) -> Split:
    found = GlyphTask("base", train_size=size, strength=strength).train()
    assert found.labels is not None
    return _scaled(found.images), found.labels


def real(seed: int) -> dict[str, TaskData]:
    """Digits, MNIST scans and textures at 32x32; at most 2,000 training images each."""
    tasks = {}
    for name, make in (("digits", digits), ("mnist", mnist), ("textures", textures)):
        splits = {split: (_resized(x), torch.from_numpy(y)) for split, (x, y) in make(0).items()}
        images, labels = splits["train"]
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=generator)[:2000]
        unlabeled = splits["calibration"][0]  # textures are sorted by class: the first are not all
        mixed = torch.randperm(len(unlabeled), generator=generator)
        train = images[order], labels[order]
        tasks[name] = TaskData(train, splits["test"], unlabeled[mixed])
    return tasks


def tables(seed: int) -> dict[str, TaskData]:
    """Scikit-learn's bundled tables, each as 16 standardised columns, split by the seed."""
    found = {
        "breast": datasets.load_breast_cancer(return_X_y=True),
        "wine": datasets.load_wine(return_X_y=True),
        "digits": datasets.load_digits(return_X_y=True),
        "diabetes": datasets.load_diabetes(return_X_y=True),
    }
    tasks = {}
    for name, (rows, target) in found.items():
        columns = torch.from_numpy(preprocessing.scale(rows)).float()
        labels = torch.from_numpy(target)
        if name == "diabetes":  # a number: its thirds
            labels = torch.bucketize(labels, labels.quantile(torch.tensor([1 / 3, 2 / 3]).double()))
        if columns.shape[1] > 16:  # its first principal components, up to equal variance
            components = torch.linalg.svd(columns, full_matrices=False)[2][:16]
            columns = columns @ components.T
            columns = columns / columns.std(0)
        columns = nn.functional.pad(columns, (0, 16 - columns.shape[1]))
        order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
        half, rest = order[: len(order) // 2], order[len(order) // 2 :]
        test, calibration = rest[::2], rest[1::2]
        tasks[name] = TaskData(
            (columns[half], labels[half].long()),
            (columns[test], labels[test].long()),
            columns[calibration],
        )
    return tasks


def made_tables() -> Split:
    """Rows of artificial tables: 12 clusters a class, to pre-train on."""
    rows, labels = datasets.make_classification(
        8000,
        16,
        n_informative=12,
        n_redundant=2,
        n_classes=8,
        n_clusters_per_class=3,
        random_state=0,
    )
    return torch.from_numpy(preprocessing.scale(rows)).float(), torch.from_numpy(labels).long()


SUITES: dict[str, Suite] = {
    "glyphs-convnext": Suite(
        network=convnext,
        head="head.fc",
        base=lambda: base_glyphs(30000, 1.0),
        base_epochs=3,
        tasks=lambda seed: {s: glyphs(s, 1.0) for s in SCRIPTS},
        epochs=4,
        checkpoint=Path("runs/glyphs/base/base.ckpt"),  # of configs/glyphs_base.yaml
    ),
    "glyphs-vit": Suite(
        network=vit,
        head="head",
        base=lambda: base_glyphs(12000, 0.4),
        base_epochs=6,
        tasks=lambda seed: {s: glyphs(s, 0.4, calibration=1000) for s in SCRIPTS[:4]},
        epochs=6,
    ),
    "real-resnet": Suite(
        network=resnet,
        head="fc",
        base=lambda: base_glyphs(10000, 1.0),
        base_epochs=3,
        tasks=real,
        epochs=6,
    ),
    "tables-transformer": Suite(
        network=TableTransformer,
        head="head",
        base=made_tables,
        base_epochs=12,
        tasks=tables,
        epochs=30,
    ),
}


def build(name: str, seed: int, root: Path = ROOT, suite: Suite | None = None) -> Experts:
    """The experts of a suite, trained if they are not there yet.

    One seed draws heads, batches and, for real data, samples. Each expert has a head and an order
    of batches of its own, as fine-tuning elsewhere would give it. All seeds share one base.
    """
    suite = suite or SUITES[name]
    template = suite.network()
    base_file = root / name / "base.safetensors"
    if not base_file.exists():
        if suite.checkpoint is not None and suite.checkpoint.exists():
            load_base(template, suite.head, suite.checkpoint)
            base = template
        else:
            base = finetune(
                suite, template, *suite.base(), epochs=suite.base_epochs, seed=0, lr=2e-3
            )
        write_tensors(base_file, split_state(base, suite.head)[0])
    set_submodule(template, suite.head, _head_of(template, suite.head, 1))
    load_backbone(template, LazyStateDict(base_file), suite.head)
    pool = ExpertPool.create(root / name / str(seed), template, suite.head, exist_ok=True)
    tasks = suite.tasks(seed)
    for task, data in tasks.items():
        if task not in pool.tasks:
            own_seed = crc32(f"{seed} {task}".encode())
            expert = finetune(
                suite, template, *data.train, epochs=suite.epochs, seed=own_seed, lr=suite.lr
            )
            pool.add(task, expert, calibration=data.calibration)
    return Experts(pool=pool, tasks=tasks, template=template.eval())


def finetune(
    suite: Suite,
    template: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    lr: float,
) -> nn.Module:
    """A copy of the template with a new head, trained with AdamW, OneCycle and batches of 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = copy.deepcopy(template)
        head = _head_of(network, suite.head, int(labels.max()) + 1)
        set_submodule(network, suite.head, head)
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
        schedule = OneCycle(optimizer, epochs * -(-len(inputs) // 128))
        network.train()
        for _ in range(epochs):
            for rows in torch.randperm(len(inputs)).split(128):
                loss = nn.functional.cross_entropy(network(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _head_of(network: nn.Module, head: str, classes: int) -> nn.Linear:
    old = network.get_submodule(head)
    assert isinstance(old, nn.Linear)
    return nn.Linear(old.in_features, classes)


def _scaled(images: Tensor) -> Tensor:
    return images.float().div_(127.5).sub_(1)


def _resized(images: object) -> Tensor:
    grey = torch.as_tensor(images)[:, None].float()
    return _scaled(nn.functional.interpolate(grey, size=(32, 32), mode="bilinear"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for suite_name in SUITES:
        for seed_number in range(3):
            experts = build(suite_name, seed_number)
            print(suite_name, seed_number, experts.pool.tasks, flush=True)
