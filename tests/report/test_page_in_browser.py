import json
import re
import shutil
import subprocess

import pytest
import torch

from lightning_merge.report.html import render_html
from lightning_merge.report.live import evaluate
from tests.report.synthetic import make_live, make_sweep

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium to open the page")

PROBE = """<script>
setTimeout(() => {
  ACTION
  setTimeout(() => {
    const texts = (query) => [...document.querySelectorAll(query)].map((e) => e.textContent);
    const found = { status: texts("#status")[0], weights: texts("#tasks .weight"),
      values: texts("#tasks .num:not(.weight):not(.head)") };
    const out = document.createElement("pre");
    out.id = "probe";
    out.textContent = JSON.stringify(found);
    document.body.append(out);
  }, 100);
}, 100);
</script></body>"""


def open_page(page, tmp_path, action=""):
    """What the page shows after an action, as a reader's browser computes it."""
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", PROBE.replace("ACTION", action)), encoding="utf-8")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--dump-dom",
    ]  # fmt: skip
    done = subprocess.run(
        [BROWSER, *options, path.as_uri()], check=True, capture_output=True, text=True, timeout=120
    )
    return json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S).group(1))


def shown(values):
    return [f"{100 * value:.1f}" for value in [*values, sum(values) / len(values)]]


def test_page_starts_at_the_equal_preference(tmp_path):
    result = make_sweep(3)
    found = open_page(render_html(result, {}), tmp_path)
    assert found["weights"] == ["33.3 %"] * 3 + [""]
    assert found["values"] == shown(result.rows()["equal"].tolist())
    assert found["status"].startswith("Evaluated: the numbers are those of this preference")


def test_sliders_without_a_live_model_show_the_nearest_evaluated_preference(tmp_path):
    result = make_sweep(3)
    action = """const sliders = document.querySelectorAll("input[type=range]");
    sliders[1].value = 50; sliders[1].dispatchEvent(new Event("input"));
    sliders[2].value = 9; sliders[2].dispatchEvent(new Event("input"));"""
    found = open_page(render_html(result, {}), tmp_path, action)
    preference = torch.tensor([100, 50, 9]).double() / 159
    nearest = int((result.preferences - preference).abs().sum(dim=1).argmin())
    assert found["weights"] == ["62.9 %", "31.4 %", "5.7 %", ""]
    assert found["values"] == shown(result.raw[nearest].tolist())
    assert found["status"].startswith(f"Nearest of {len(result.kinds)} evaluated preferences")


def test_sliders_with_a_live_model_evaluate_the_preference_itself(tmp_path):
    live = make_live(3)
    action = """document.querySelectorAll(".only button")[0].click();
    const slider = document.querySelectorAll("input[type=range]")[2];
    slider.value = 25; slider.dispatchEvent(new Event("input"));"""
    found = open_page(render_html(make_sweep(3), {}, live), tmp_path, action)
    expected = evaluate(live, torch.tensor([0.8, 0.0, 0.2]))
    assert found["weights"] == ["80 %", "0 %", "20 %", ""]
    assert found["values"] == shown(expected.tolist())
    assert "on all test samples" in found["status"]
