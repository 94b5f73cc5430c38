import math
import warnings

import numpy as np
import pytest
import torch

from lightning_merge.modules import OneCycle, WarmupCosine


def rates(schedule_class, steps, **options):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    schedule = schedule_class(optimizer, steps, **options)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(seen) < steps else None
    return np.array(seen)


def test_one_cycle_matches_its_formula():
    steps, warmup = 41, 0.3
    peak = warmup * steps - 1
    want = [
        0.5 / 25 + (0.5 - 0.5 / 25) * (1 - math.cos(math.pi * i / peak)) / 2
        if i <= peak
        else 0.5 / 25e4
        + (0.5 - 0.5 / 25e4) * (1 + math.cos(math.pi * (i - peak) / (steps - 1 - peak))) / 2
        for i in range(steps)
    ]
    np.testing.assert_allclose(rates(OneCycle, steps), want, rtol=1e-12)


def test_warmup_cosine_rises_then_falls_to_the_floor():
    seen = rates(WarmupCosine, 101, warmup=0.1, floor=0.2)
    assert seen[0] == pytest.approx(0.5 / 11)
    assert seen.argmax() == 10
    assert seen.max() == 0.5
    assert (np.diff(seen[10:]) < 0).all()
    assert seen[-1] == pytest.approx(0.1, abs=1e-3)


def test_warmup_must_be_a_fraction():
    with pytest.raises(ValueError, match=r"warmup is a fraction of the steps, in \[0, 1\), got 5"):
        rates(WarmupCosine, 10, warmup=5.0)


@pytest.mark.parametrize("schedule_class", [OneCycle, WarmupCosine])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_fits(schedule_class, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(rates(schedule_class, steps)).all()


def test_state_is_plain_data(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for schedule_class in (OneCycle, WarmupCosine):
        torch.save(schedule_class(optimizer, 10).state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)
