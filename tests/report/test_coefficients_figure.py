"""The picture of learned coefficients: made from files, with and without a history."""

import pytest
import torch

from lightning_merge.methods.adaptation.coefficients import LearnedCoefficients
from lightning_merge.report.coefficients_figure import coefficients_figure, main


def learned(groups, history=True):
    names = tuple(f"blocks.{g}.weight" for g in range(groups))
    values = torch.linspace(-0.5, 1.0, groups * 2, dtype=torch.float64).view(groups, 2)
    series = {"entropy": torch.rand(5, 2, dtype=torch.float64)} if history else {}
    return LearnedCoefficients(values=values, groups=names, tasks=("a", "b"), history=series)


def test_picture_from_a_folder(tmp_path, capsys):
    learned(3).save(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "coefficients.png").read_bytes()[1:4] == b"PNG"
    assert "coefficients.png" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main([]) == 2


@pytest.mark.parametrize(("groups", "history"), [(1, True), (150, True), (4, False)])
def test_any_number_of_groups(groups, history):
    found = learned(groups, history)
    figure = coefficients_figure(found)
    heat = figure.axes[0]
    assert len(heat.get_yticklabels()) <= 40
    assert heat.images[0].get_array().tolist() == found.values.tolist()
    limits = heat.images[0].get_clim()
    assert limits[0] == -limits[1] == -1.0 if groups > 1 else True
    written = [float(text.get_text()) for text in heat.texts]
    assert written == ([] if groups > 12 else pytest.approx(found.values.flatten(), abs=5e-3))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert any("entropy" in title for title in titles) == history
