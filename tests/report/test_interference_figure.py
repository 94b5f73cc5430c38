import pytest

from lightning_merge.methods import TSVMerge
from lightning_merge.methods.interference import merge_report
from lightning_merge.report import interference_figure, merge_pictures
from tests.methods.models import models

SHAPES = {f"blocks.{i}.fc.{kind}": s for i in range(3) for kind, s in (("w", (5, 4)), ("b", (5,)))}


def test_every_layer_and_every_task_is_drawn():
    report = merge_report(*models(3, shapes=SHAPES), TSVMerge()).as_dict()
    norms, cosines, conflicts, singular = interference_figure(report).axes
    assert [line.get_label() for line in norms.lines] == ["task0", "task1", "task2"]
    for line, task in zip(norms.lines, range(3), strict=True):
        expected = [100 * row["relative_norms"][task] for row in report["layers"]]
        assert line.get_ydata() == pytest.approx(expected)
    assert cosines.lines[1].get_ydata() == pytest.approx(
        [row["cosine"]["mean"] for row in report["layers"]]
    )
    heights = [bar.get_height() for bar in conflicts.patches]
    assert heights == pytest.approx([100 * row["sign_conflict"] for row in report["layers"]])
    assert len(singular.patches) == 3
    labels = [label.get_text() for label in singular.get_xticklabels()]
    assert labels == ["blocks.0.fc", "blocks.1.fc", "blocks.2.fc"]


def test_without_singular_directions_and_without_a_report():
    report = merge_report(*models(20, shapes=SHAPES), singular=False).as_dict()
    assert len(interference_figure(report).axes) == 3
    assert merge_pictures(report)["interference.png"].startswith(b"\x89PNG")
    assert merge_pictures({}) == {}
    with pytest.raises(ValueError, match="nothing to draw: merge with report='full'"):
        interference_figure({})
