import pytest
from matplotlib.figure import Figure

from lightning_merge.diagnosing import Diagnosis
from lightning_merge.merge_errors import MergeError
from lightning_merge.methods.layer_diagnosis import BASES, LayerDiagnosis
from lightning_merge.report import diagnosis_figure
from lightning_merge.report.diagnosis_figure import SHOWN, write_diagnosis_picture


def layer(name, energy):
    shares = dict(zip(BASES, (0.1, 0.2, 0.25, 0.5, 0.3, 0.3, 0.6), strict=True))
    return LayerDiagnosis(name, "linear", energy, shares, shares, {"Average()": -0.5})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a diagnosis of some layers; gives the figure."""
    figures = []

    def new_figure(width, height):
        figures.append(Figure(figsize=(width, height), layout="constrained"))
        return figures[-1]

    monkeypatch.setattr(diagnosis_figure, "new_figure", new_figure)

    def draw(layers):
        errors = {"base": MergeError(1.0, 0.5), "TaskArithmetic(scale=0.3)": MergeError(0.7, 0.4)}
        diagnosis = Diagnosis(tasks=["a", "b"], layers=layers, left={}, merges=errors)
        path = write_diagnosis_picture(diagnosis, tmp_path)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def labels(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def test_layers_keep_their_order_and_lose_what_all_names_begin_with(drawn):
    figure = drawn([layer("net.blocks.1.b", 1.0), layer("net.blocks.0.a", 3.0)])
    layers, networks, _ = figure.axes
    assert labels(layers) == ["1.b", "0.a"]
    assert "'net.blocks.'" in layers.get_title(loc="left")
    assert [text.get_text() for text in layers.texts] == ["25%", "75%"]
    assert labels(networks) == ["base", "TaskArithmetic(scale=0.3)"]
    assert layers.get_ylim() == (1.6, -0.6)  # the first on top


def test_of_very_many_layers_the_heaviest_are_drawn_and_counted(drawn):
    names = [f"blocks.{k}.fc" for k in range(3 * SHOWN)]
    heavy = {name for k, name in enumerate(names) if k % 3 == 1}
    figure = drawn([layer(name, 2.0 if name in heavy else 1.0) for name in names])
    layers = max(figure.axes, key=lambda axes: len(labels(axes)))
    assert labels(layers) == [n.removeprefix("blocks.") for n in names if n in heavy]
    assert f"{SHOWN} of {3 * SHOWN} layers" in layers.get_title(loc="left")
    # Marks and bars keep their size: a picture is as tall as what it shows.
    assert figure.get_size_inches()[1] < 0.25 * SHOWN + 3


def test_the_legend_names_bars_before_marks(drawn):
    figure = drawn([layer("a", 1.0)])
    (legend,) = [a.get_legend() for a in figure.axes if a.get_legend() and not a.axison]
    found = [text.get_text() for text in legend.get_texts()]
    assert found[0].startswith("by one coefficient")
    assert found[4:] == ["by none: conflict", "any update, held out", "Average()"]


def test_a_diagnosis_without_layers_has_a_picture(drawn):
    assert drawn([]) is not None
