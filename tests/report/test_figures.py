import matplotlib
import pytest
import torch

from lightning_merge.report import front_figure as fronts
from lightning_merge.report.figures import front_figure, response_figure, ternary_figure
from lightning_merge.report.pictures import columns_for, shorten
from tests.report.synthetic import make_sweep


def panels(figure):
    return [axes for axes in figure.get_axes() if axes.get_xlabel() and axes.get_ylabel()]


@pytest.mark.parametrize(("num_tasks", "count"), [(2, 1), (3, 3), (4, 6), (8, 6)])
def test_front_shows_all_pairs_or_the_most_contested(num_tasks, count):
    result = make_sweep(num_tasks, points=5)
    figure = front_figure(result)
    assert len(panels(figure)) == count
    edges = fronts.front_edges(result)
    assert len(edges) == num_tasks * (num_tasks - 1) // 2
    costs = sorted((fronts.contest(result, edge) for edge in edges.values()), reverse=True)
    shown = {(axes.get_xlabel(), axes.get_ylabel()) for axes in panels(figure)}
    shown_costs = [
        fronts.contest(result, edge)
        for (x, y), edge in edges.items()
        if (result.tasks[x], result.tasks[y]) in shown
    ]
    assert sorted(shown_costs, reverse=True) == costs[:count]


def test_front_line_holds_the_values_of_the_edge():
    result = make_sweep(2, points=5)
    axes = panels(front_figure(result))[0]
    line = next(line for line in axes.get_lines() if line.get_linewidth() == 1.3)
    edge = fronts.front_edges(result)[0, 1]
    assert result.preferences[edge, 1].tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    torch.testing.assert_close(
        torch.tensor(line.get_xydata()), 100 * result.normalized[edge], check_dtype=False
    )


def test_contest_is_the_shortfall_of_the_best_compromise():
    result = make_sweep(2, points=3, references={
        "experts": torch.ones(2), "base": torch.zeros(2), "uncorrected": torch.zeros(2),
    })  # fmt: skip
    raw = result.raw.clone()
    edge = fronts.front_edges(result)[0, 1]
    raw[edge] = torch.tensor([[0.9, 0.4], [0.8, 0.6], [0.5, 0.7]]).double()
    changed = make_sweep(2, points=3, raw=raw, references=result.references)
    assert fronts.contest(changed, edge) == pytest.approx(10.0)  # (0.9 - 0.8 + 0.7 - 0.6) / 2


def test_front_without_edges_shows_the_points_it_has():
    result = make_sweep(3)
    keep = [i for i, kind in enumerate(result.kinds) if kind == "priority"]
    sparse = make_sweep(
        3,
        preferences=result.preferences[keep],
        raw=result.raw[keep],
        kinds=("priority",) * 3,
        favoured=result.tasks,
    )
    assert not fronts.front_edges(sparse)
    assert len(panels(front_figure(sparse))) == 3


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_response_draws_each_task_against_its_own_weight(num_tasks):
    result = make_sweep(num_tasks, points=5)
    figure = response_figure(result)
    for task, axes in enumerate(figure.get_axes()[:num_tasks]):
        assert axes.get_title(loc="left") == result.tasks[task]
        own = next(line for line in axes.get_lines() if line.get_linewidth() == 1.8)
        weight, value = torch.tensor(own.get_xydata()).T
        assert bool((weight.diff() >= 0).all())
        assert weight[-1] == 1.0
        rows = [i for i, k in enumerate(result.kinds) if k == "response"]
        rows = [i for i in rows if result.favoured[i] == result.tasks[task]]
        assert sorted(value.tolist()) == pytest.approx(
            sorted((100 * result.normalized[rows, task]).tolist())
        )


def test_ternary_needs_three_tasks():
    assert len(ternary_figure(make_sweep(3)).get_axes()) == 5  # mean, three tasks, colour bar
    with pytest.raises(ValueError, match="exactly 3 tasks, found 2"):
        ternary_figure(make_sweep(2))


def test_pictures_of_losses_and_of_zero_experts_are_drawn(tmp_path):
    references = dict(make_sweep(3).references)
    references["experts"] = torch.tensor([0.0, 0.9, 0.9])
    for result in (
        make_sweep(3, points=3, references=references),
        make_sweep(3, points=3, metric="loss", higher_is_better=False),
    ):
        for draw in (front_figure, response_figure, ternary_figure):
            draw(result).savefig(tmp_path / "picture.png")


def test_pictures_leave_pyplot_and_its_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    response_figure(make_sweep(2)).savefig(tmp_path / "picture.png")
    assert dict(matplotlib.rcParams) == before


def test_names_are_shortened_in_their_middle():
    assert shorten("greek", 8) == "greek"
    assert shorten("satellite_images_v2", 11) == "satel…es_v2"
    assert [columns_for(n) for n in (1, 2, 3, 4, 5, 6, 8, 9, 20)] == [1, 2, 3, 4, 5, 3, 4, 3, 5]
