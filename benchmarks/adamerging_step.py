"""One layer-wise AdaMerging step at the size of a ViT-B/32: CPU time and peak memory.

``python -m benchmarks.adamerging_step [--peer_python PATH] [--depth N] [--images N]``

Every contender runs in a process of its own, one thread, on the same random experts.
"""

import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.results import table, write

CLASSES = 10
RNG = 0


@dataclass(frozen=True)
class Size:
    """What is merged."""

    folder: Path
    experts: int
    images: int
    depth: int
    steps: int


def network(size: Size) -> nn.Module:
    """A ViT of the published width, random."""
    import timm

    return timm.create_model("vit_base_patch32_224", num_classes=CLASSES, depth=size.depth).eval()


def prepare(size: Size) -> None:
    """Write base and experts, one at a time."""
    from lightning_merge.files import write_tensors
    from lightning_merge.networks import split_state

    torch.manual_seed(RNG)
    base = split_state(network(size), "head")[0]
    write_tensors(size.folder / "base.safetensors", base)
    for index in range(size.experts):
        expert = {n: v + 0.02 * v.std() * torch.randn_like(v) for n, v in base.items()}
        write_tensors(size.folder / f"{index}.safetensors", expert)


def images_of(size: Size, step: int) -> dict[str, Tensor]:
    """The samples of one step by task; the same for all contenders."""
    generator = torch.Generator().manual_seed(step)
    return {
        f"task{t}": torch.randn(size.images, 3, 224, 224, generator=generator)
        for t in range(size.experts)
    }


def heads_of(size: Size) -> list[nn.Linear]:
    torch.manual_seed(RNG + 1)
    return [nn.Linear(768, CLASSES).requires_grad_(False) for _ in range(size.experts)]


class Reopened(Mapping[str, Tensor]):
    """A file of weights that is opened for one tensor at a time, so that no page stays mapped."""

    def __init__(self, path: Path) -> None:
        from lightning_merge.states import LazyStateDict

        self.path, self.names = path, list(LazyStateDict(path))

    def __getitem__(self, name: str) -> Tensor:
        from lightning_merge.states import LazyStateDict

        return LazyStateDict(self.path)[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def ours(size: Size, storage: str = "bfloat16") -> Callable[[int], Tensor]:
    """AdaMerging as it is, with the images of two tasks in a forward pass."""
    from lightning_merge.calibration import CalibrationInputs
    from lightning_merge.methods import AdaMerging, Calibration
    from lightning_merge.methods.adaptation.learner import Learner

    heads = {f"task{t}": head for t, head in enumerate(heads_of(size))}

    def expert(task: str) -> nn.Module:
        filled = network(size)
        filled.head = heads[task]
        return filled

    method = AdaMerging(
        batch_size=size.images,
        max_images_per_forward=2 * size.images,
        storage=storage,  # type: ignore[arg-type]
    )
    inputs = {task: CalibrationInputs.collect(x) for task, x in images_of(size, 0).items()}
    calibration = Calibration(network=expert, head="head", inputs=inputs)
    base = Reopened(size.folder / "base.safetensors")
    experts = {f"task{t}": Reopened(size.folder / f"{t}.safetensors") for t in range(size.experts)}
    weights, shared, _ = method._prepare(base, experts, calibration)
    groups = tuple(weights.group_of)
    learner = Learner(method, calibration, shared, weights, groups, "")
    coefficients = torch.full((len(groups), size.experts), 0.3, dtype=torch.float64)

    def step(number: int) -> Tensor:
        weights.write(coefficients)
        return learner.sums(number).gradient

    return step


def entropy(logits: Tensor) -> Tensor:
    scores = logits.log_softmax(1)
    return -(scores.exp() * scores).sum(1).mean()


def backbones(size: Size) -> list[nn.Module]:
    """The base and the experts in memory, without heads."""
    from safetensors.torch import load_file

    found = []
    for name in ("base", *range(size.experts)):
        backbone = network(size)
        backbone.reset_classifier(0)
        backbone.load_state_dict(load_file(size.folder / f"{name}.safetensors"))
        found.append(backbone)
    return found


def fusion_bench(size: Size) -> Callable[[int], Tensor]:
    """Its wrapper and its loop: one graph through the merge, traversed once a task."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    base, *experts = backbones(size)
    layers = len([p for p in base.parameters() if p.requires_grad])
    start = torch.full((size.experts, layers), 0.3)
    module = LayerWiseMergedModel(start, base, experts, clamp_weights=False)
    heads = heads_of(size)

    def step(number: int) -> Tensor:
        module.merge_weight.grad = None
        module.merge_weights()
        for head, images in zip(heads, images_of(size, number).values(), strict=True):
            entropy(head(module(images))).backward(retain_graph=True)
        assert module.merge_weight.grad is not None
        return module.merge_weight.grad.T

    return step


def retraversing(size: Size) -> Callable[[int], Tensor]:
    """The plain way: for every task, merge in the graph and go back through it."""
    base, *experts = backbones(size)
    origin = {n: p.detach() for n, p in base.named_parameters()}
    vectors = [{n: p.detach().sub_(origin[n]) for n, p in e.named_parameters()} for e in experts]
    coefficients = torch.full((len(origin), size.experts), 0.3, requires_grad=True)
    heads = heads_of(size)

    def step(number: int) -> Tensor:
        coefficients.grad = None
        for head, images in zip(heads, images_of(size, number).values(), strict=True):
            merged = {
                n: v + sum(c * e[n] for c, e in zip(row, vectors, strict=True))
                for (n, v), row in zip(origin.items(), coefficients, strict=True)
            }
            entropy(head(functional_call(base, merged, (images,)))).backward()
        assert coefficients.grad is not None
        return coefficients.grad

    return step


CONTENDERS: dict[str, Callable[[Size], Callable[[int], Tensor]]] = {
    "ours, bfloat16 task vectors": ours,
    "ours, task vectors read anew": lambda size: ours(size, "stream"),
    "ours, exact task vectors": lambda size: ours(size, "exact"),
    "FusionBench's wrapper and loop": fusion_bench,
    "plain prototype, merged anew for every task": retraversing,
}


def measure(name: str, size: Size) -> dict[str, float]:
    """CPU seconds of a step, of its whole process the peak memory, and a norm to compare."""
    step = CONTENDERS[name](size)
    ready = _peak()
    spent = []
    norm = math.nan
    for _ in range(size.steps):
        start = time.process_time()
        norm = float(step(0).double().norm())
        spent.append(time.process_time() - start)
    return {"seconds": min(spent), "peak": _peak(), "ready": ready, "norm": norm}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(
    peer_python: str = sys.executable,
    experts: int = 8,
    images: int = 16,
    depth: int = 12,
    steps: int = 2,
    only: str | None = None,
    folder: str | None = None,
    write_results: bool = True,
) -> None:
    """Write docs/results/adamerging_step.md.

    Args:
        peer_python: Interpreter that has FusionBench; this one by default.
        experts: How many.
        images: Samples of each task in a step.
        depth: Blocks of the ViT; 12 is its own.
        steps: Steps of which the fastest counts.
        only: One contender, measured in this process; its figures are printed as JSON.
        folder: Where base and experts are, with ``only``.
        write_results: Write the file, and not only print.
    """
    torch.set_num_threads(1)
    if only is not None:
        assert folder is not None
        if only.startswith("FusionBench") and importlib.util.find_spec("fusion_bench") is None:
            raise SystemExit("FusionBench is not installed: pip install lightning-merge[peers]")
        print(json.dumps(measure(only, Size(Path(folder), experts, images, depth, steps))))
        return
    with tempfile.TemporaryDirectory() as made:
        prepare(Size(Path(made), experts, images, depth, steps))
        found: dict[str, dict[str, float] | str] = {}
        for name in CONTENDERS:
            python = peer_python if name.startswith("FusionBench") else sys.executable
            found[name] = _in_process(
                python, name, made, f"--experts={experts}", f"--images={images}",
                f"--depth={depth}", f"--steps={steps}",
            )  # fmt: skip
            print(name, found[name], flush=True)
    text = _table(found)
    print(text)
    if write_results:
        lines = f"{experts} experts, {images} samples each, ViT-B/32 with {depth} blocks"
        write("adamerging_step", "One AdaMerging step", [RNG], [_about(lines), text])


def _in_process(python: str, name: str, folder: str, *options: str) -> dict[str, float] | str:
    command = [python, "-m", "benchmarks.adamerging_step", f"--only={name}", f"--folder={folder}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _table(found: Mapping[str, dict[str, float] | str]) -> str:
    peer = found["FusionBench's wrapper and loop"]
    rows = []
    for name, value in found.items():
        if isinstance(value, str):
            rows.append([name, value, "", "", "", ""])
            continue
        ratios = ["", ""]
        if not isinstance(peer, str):
            ratios = [f"{value[key] / peer[key]:.2f}" for key in ("seconds", "peak")]
        rows.append(
            [name, f"{value['seconds']:.1f}", f"{value['peak']:.2f}", *ratios,
             f"{value['norm']:.6g}"]
        )  # fmt: skip
    header = ["contender", "CPU seconds", "peak GiB", "time ratio", "memory ratio", "gradient norm"]
    return table(header, rows)


def _about(lines: str) -> str:
    return (
        f"{lines}, random weights and images. CPU seconds of the fastest step (gradient of all "
        "coefficients, one a tensor and task), peak memory of the whole process; ratios to "
        "FusionBench's. The norms of the gradients must agree. Ours has the samples of two tasks "
        "in a forward pass."
    )


if __name__ == "__main__":
    auto_cli(main)
