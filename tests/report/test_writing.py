import json
import re

import pytest

from lightning_merge.report import html as page_module
from lightning_merge.report import write_report
from lightning_merge.report.html import render_html
from tests.report.synthetic import make_live, make_sweep


def embedded(page, name):
    return json.loads(re.search(rf'<script id="{name}"[^>]*>(.*?)</script>', page, re.S).group(1))


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_report_writes_pictures_and_the_page_last(num_tasks, tmp_path):
    result = make_sweep(num_tasks, points=3, names=("a", "b", "c"))
    paths = write_report(result, tmp_path / "sweep")
    ternary = ["ternary.png"] if num_tasks == 3 else []
    assert [path.name for path in paths] == ["front.png", *ternary, "response.png", "report.html"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(
        path.name for path in paths
    )
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[:-1])
    before = [path.read_bytes() for path in paths]
    write_report(result, tmp_path / "sweep")
    assert [path.read_bytes() for path in paths] == before


def test_page_opens_offline_and_holds_the_sweep():
    result = make_sweep(3)
    page = render_html(result, {"front.png": b"picture"})
    outside = re.findall(
        r'(?:src|href)="(?!data:)[^"]*"|@import|https?://(?!www\.w3\.org/2000/svg)', page
    )
    assert outside == []
    data = embedded(page, "data")
    assert data["tasks"] == list(result.tasks)
    assert len(data["raw"]) == len(result.kinds)
    assert data["raw"][5] == pytest.approx(result.raw[5].tolist(), abs=1e-6)
    assert data["rows"]["experts"] == pytest.approx(result.references["experts"].tolist(), abs=1e-6)
    assert 'id="live"' not in page
    for text in ("TaskArithmetic(scale=0.3)", "2.6.0", "61.2 s", "beta relative", "uniformity"):
        assert text in page


def test_page_shows_nested_facts_of_the_correction_by_name():
    result = make_sweep(2)
    for task in result.tasks:
        result.diagnostics[task] |= {"searched": False, "distortion": {"bias": 0.25, "linear": 0.5}}
        result.diagnostics[task] |= {"search": {"curve": [0.1, 0.2], "at_edge": True}}
    page = render_html(result, {})
    for name, value in (
        ("distortion, bias", "0.25"),
        ("searched", "no"),
        ("search, at edge", "yes"),
    ):
        cells = "".join(f"<td>{value}</td>" for _ in result.tasks)
        assert f'<tr><th scope="row">{name}</th>{cells}</tr>' in page
    assert "search, curve" not in page


def test_page_warns_of_a_merge_that_loses_to_the_base():
    result = make_sweep(3)
    references = dict(result.references)
    references["base"] = references["uncorrected"] + 0.05
    page = render_html(make_sweep(3, references=references), {})
    assert "The uncorrected merge loses to the base" in page
    assert "loses to the base" not in render_html(result, {})


def test_names_and_methods_are_escaped():
    names = ['<script>alert("x")</script>', "a&b", "c"]
    page = render_html(make_sweep(3, names=names, method="<b>TIES</b>"), {})
    assert "<script>alert" not in page
    assert "<b>TIES</b>" not in page
    assert embedded(page, "data")["tasks"] == names


def test_live_model_is_embedded_whole():
    live = make_live(3, samples_per_task=5)
    page = render_html(make_sweep(3), {}, live)
    assert embedded(page, "live-header") == json.loads(live.header())
    text = re.search(r'<script id="live" type="text/plain">(.*?)</script>', page, re.S).group(1)
    assert text == live.encode()
    assert embedded(page, "data")["samples"] == [5, 5, 5]


def test_live_model_that_cannot_be_used_is_left_out_and_says_why(monkeypatch):
    live = make_live(3)
    page = render_html(make_sweep(3, metric="f1"), {}, live)
    assert "this sweep measured f1" in page
    assert 'id="live"' not in page
    monkeypatch.setattr(page_module, "MAX_BYTES", 1000)
    page = render_html(make_sweep(3), {}, live)
    assert "Live evaluation was left out" in page
    assert 'id="live"' not in page
    with pytest.raises(ValueError, match="the live model has the tasks"):
        render_html(make_sweep(2), {}, live)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        write_report(make_sweep(2, points=2), tmp_path / "file" / "sweep")
