import json
import shutil
import subprocess
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_merge.report import build_live
from lightning_merge.report.live import evaluate
from tests.report.synthetic import make_live, make_sweep

NODE = shutil.which("node")


def reference_accuracies(heads, normal, samples, preference):
    """The explicit correction of every sample, by NumPy's general solver."""
    numerator = sum(p * n for p, (n, _) in zip(preference, normal.values(), strict=True))
    gram = sum(p * c for p, (_, c) in zip(preference, normal.values(), strict=True))
    weight = torch.linalg.solve(gram.T, numerator.T).T
    found = []
    for task, (head, bias) in heads.items():
        features, labels = samples[task]
        logits = features.double() @ weight.T @ head.T + bias
        found.append((logits.argmax(dim=1) == labels).double().mean())
    return torch.stack(found)


def random_parts(seed, width=5, depth=7):
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    heads, normal, samples = {}, {}, {}
    for index, task in enumerate(("a", "b", "c")):
        z = numbers(30, width)
        heads[task] = (numbers(3 + index, depth), numbers(3 + index))
        normal[task] = (numbers(depth, width), z.T @ z)
        samples[task] = (z[:11].float(), torch.randint(3, (11,), generator=draw))
    return heads, normal, samples


@settings(deadline=None)
@given(st.integers(0, 1000), st.tuples(*[st.integers(0, 5)] * 3).filter(any))
def test_evaluation_is_that_of_the_explicit_correction(seed, preference):
    parts = random_parts(seed)
    live = build_live(*parts)
    weights = torch.tensor(preference).double()
    expected = reference_accuracies(*parts, preference)
    torch.testing.assert_close(evaluate(live, weights), expected)
    torch.testing.assert_close(evaluate(live, weights * 7), expected)


def run_node(live, preferences, tmp_path):
    """The page's own script, without the page."""
    text = files("lightning_merge.report").joinpath("solver.html.jinja").read_text()
    (tmp_path / "solver.js").write_text(text.replace("<script>", "").replace("</script>", ""))
    (tmp_path / "live.json").write_text(
        json.dumps({"header": json.loads(live.header()), "text": live.encode(), "p": preferences})
    )
    (tmp_path / "run.js").write_text(
        "const Live = require('./solver.js');"
        "const given = JSON.parse(require('fs').readFileSync('live.json'));"
        "const model = Live.decode(given.header, given.text);"
        "console.log(JSON.stringify(given.p.map((p) => ({"
        "accuracy: Live.evaluate(model, p), heads: Array.from(Live.fold(model, p)) }))));"
    )
    done = subprocess.run(
        [NODE, "run.js"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="needs node to run the page's script")
@pytest.mark.parametrize("num_tasks", [1, 3, 8])
def test_the_page_computes_what_torch_computes(num_tasks, tmp_path):
    live = make_live(num_tasks, width=13)
    generator = torch.Generator().manual_seed(1)
    preferences = torch.rand(4, num_tasks, generator=generator).double()
    preferences = torch.cat([preferences, torch.eye(num_tasks, dtype=torch.float64)])
    found = run_node(live, preferences.tolist(), tmp_path)
    for preference, page in zip(preferences, found, strict=True):
        gram = torch.einsum("t,tij->ij", preference, live.gram)
        product = torch.einsum("t,tki->ki", preference, live.products)
        heads = torch.linalg.solve(gram, product.T).T
        # two solvers in float64: their difference is rounding times a condition near 1e3
        torch.testing.assert_close(
            torch.tensor(page["heads"], dtype=torch.float64), heads.flatten(), rtol=1e-9, atol=1e-9
        )
        assert page["accuracy"] == evaluate(live, preference).tolist()
    assert len({tuple(page["accuracy"]) for page in found}) > 1 or num_tasks == 1


def test_samples_are_spread_and_counted():
    heads, normal, samples = random_parts(0)
    live = build_live(heads, normal, samples, samples_per_task=4)
    assert live.available == (11, 11, 11)
    assert live.labels[1].tolist() == samples["b"][1][[0, 2, 5, 8]].tolist()
    assert torch.equal(live.features[1], samples["b"][0][[0, 2, 5, 8]])
    assert len(live.encode()) == live.num_bytes
    assert (
        len(make_live(3, samples_per_task=7).encode()) == make_live(3, samples_per_task=7).num_bytes
    )


def test_a_head_without_bias_has_a_bias_of_zero():
    heads, normal, samples = random_parts(0)
    plain = {task: (weight, None) for task, (weight, _) in heads.items()}
    zero = {task: (weight, torch.zeros(len(weight))) for task, (weight, _) in heads.items()}
    assert torch.equal(
        build_live(plain, normal, samples).bias, build_live(zero, normal, samples).bias
    )


def test_parts_that_do_not_fit_are_named():
    heads, normal, samples = random_parts(0)
    with pytest.raises(
        ValueError, match=r"samples has the tasks \['a'\], heads has \['a', 'b', 'c'\]"
    ):
        build_live(heads, normal, {"a": samples["a"]})
    with pytest.raises(ValueError, match=r"task 'b': C must have shape \(5, 5\), found \(4, 4\)"):
        build_live(heads, normal | {"b": (normal["b"][0], torch.eye(4))}, samples)
    with pytest.raises(ValueError, match=r"task 'c': head weight must have shape \(5, 7\)"):
        build_live(heads | {"c": (torch.zeros(5, 2), None)}, normal, samples)
    empty = (torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="task 'a' has no test samples"):
        build_live(heads, normal, samples | {"a": empty})
    with pytest.raises(ValueError, match="at least one task"):
        build_live({}, {}, {})


def test_synthetic_experts_are_hard_to_merge_and_easy_to_recover():
    live = make_live(3)
    assert make_sweep(3).tasks == live.tasks
    own = torch.stack([evaluate(live, row)[i] for i, row in enumerate(torch.eye(3))])
    assert float(own.min()) > 0.9
    assert float(evaluate(live, torch.ones(3)).mean()) < 0.9
