import torch

from lightning_merge.methods import (
    CalibratedMethod,
    Coefficient,
    IsoC,
    OutputProjection,
    RegMean,
    TaskArithmetic,
)
from lightning_merge.report import plan_text
from tests.methods.models import models

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "norm.running_var": (4,)}


def lines_of(method, base, experts):
    return [line.rstrip() for line in plan_text(method, base, experts).splitlines()]


def test_every_parameter_and_the_totals():
    base, experts = models(2, shapes=SHAPES)
    for state in (base, *experts.values()):
        state["tied"], state["steps"] = state["a.weight"], torch.tensor(3)
    rule = Coefficient(value=0.5, task="task1", pattern="a.*")
    method = TaskArithmetic(coefficients=(rule,))
    assert lines_of(method, base, experts) == [
        "TaskArithmetic of 2 experts (task0, task1); nothing is written.",
        "",
        "parameter         shape  dtype    gets                    coefficients",
        "a.bias            4      float32  TaskArithmetic          1, 0.5",
        "a.weight          4×3    float32  TaskArithmetic          1, 0.5",
        "norm.running_var  4      float32  average of the experts",
        "tied              4×3    float32  tied to a.weight",
        "steps             1      int64    value of the base",
        "",
        "total                   parameters  entries",
        "TaskArithmetic          2           16",
        "average of the experts  1           4",
        "value of the base       1           1",
        "tied                    1",
        "all                     4           21",
        "most entries held at once: 48",
    ]


def test_methods_for_matrices_and_methods_with_data():
    base, experts = models(2, shapes=SHAPES)
    assert "a.bias            4      float32  mean of the task vectors  1" in lines_of(
        IsoC(), base, experts
    )

    class Learned(CalibratedMethod):
        def merge(self, base, experts, calibration):
            raise AssertionError

    found = lines_of(Learned(), base, experts)
    assert "a.bias            4      float32  decided with data" in found
    assert found[0].startswith("Learned of 2 experts")


def test_what_is_known_of_a_method_with_data_is_said():
    base, experts = models(2, shapes=SHAPES)
    base["bn.running_var"], base["n"] = torch.ones(3), torch.tensor(1)
    for expert in experts.values():
        expert["bn.running_var"], expert["n"] = torch.ones(3), torch.tensor(1)
    found = lines_of(RegMean(), base, experts)
    assert "a.bias            4      float32  average of the experts" in found
    assert any(line.startswith("bn.running_var") and "average of" in line for line in found)
    assert any(line.startswith("n ") and "value of the base" in line for line in found)
    assert any("decided with data" in line for line in found)
    method = OutputProjection(layers=("linear",), fallback=TaskArithmetic())
    base["scale.gamma"] = torch.ones(3)
    for expert in experts.values():
        expert["scale.gamma"] = torch.ones(3)
    found = lines_of(method, base, experts)
    assert any(x.startswith("scale.gamma") and "merged by the fallback" in x for x in found)
