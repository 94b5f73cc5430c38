"""Learning-rate schedules that know the number of optimizer steps of the whole fit."""

import math
from typing import final

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR


@final
class OneCycle(OneCycleLR):
    """Cosine up to the optimizer's learning rate, then down to nearly zero.

    The one-cycle policy (Smith and Topin, 2019, arXiv:1708.07120). Momentum is not cycled.

    Args:
        optimizer: Its learning rate is the peak.
        total_steps: Optimizer steps of the whole fit.
        warmup: Fraction of the steps spent going up, in (0, 1).
        start_divisor: The first learning rate is the peak divided by this.
        end_divisor: The last learning rate is the first one divided by this.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup: float = 0.3,
        start_divisor: float = 25.0,
        end_divisor: float = 1e4,
    ) -> None:
        super().__init__(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total_steps,
            pct_start=warmup,
            div_factor=start_divisor,
            final_div_factor=end_divisor,
            cycle_momentum=False,
        )


@final
class WarmupCosine(LambdaLR):
    """Linear up to the optimizer's learning rate, then a half cosine down.

    Args:
        optimizer: Its learning rate is the peak.
        total_steps: Optimizer steps of the whole fit.
        warmup: Fraction of the steps spent going up, in [0, 1).
        floor: Last learning rate as a fraction of the peak.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.0
    ) -> None:
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps, in [0, 1), got {warmup}.")
        rising = round(warmup * total_steps)

        def factor(step: int) -> float:
            if step < rising:
                return (step + 1) / (rising + 1)
            done = min(1.0, (step - rising) / max(1, total_steps - rising))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
