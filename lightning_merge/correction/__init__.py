"""Closed-form correction of a merged representation, steered by a preference."""

from lightning_merge.correction.closed_form import ClosedFormCorrection
from lightning_merge.correction.head_maps import HeadMetric
from lightning_merge.correction.linear_map import LinearMap
from lightning_merge.correction.options import CorrectionOptions
from lightning_merge.correction.search import BetaSearch
from lightning_merge.correction.statistics import CorrectionStatistics
from lightning_merge.correction.validation import HeldOutError, cross_validated_errors
from lightning_merge.functional.preference import as_preference, as_preferences

__all__ = [
    "BetaSearch",
    "ClosedFormCorrection",
    "CorrectionOptions",
    "CorrectionStatistics",
    "HeadMetric",
    "HeldOutError",
    "LinearMap",
    "as_preference",
    "as_preferences",
    "cross_validated_errors",
]
