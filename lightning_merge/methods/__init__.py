"""Merging methods: each a frozen dataclass of hyper-parameters with one ``merge``."""

from lightning_merge.methods.adamerging import AdaMerging
from lightning_merge.methods.average import Average
from lightning_merge.methods.base import MergeMethod, WeightMethod
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.calibrated import CalibratedMethod, Calibration
from lightning_merge.methods.compress import CompressedExperts, TSVCompress
from lightning_merge.methods.consensus import Consensus
from lightning_merge.methods.dare import DARE
from lightning_merge.methods.della import DELLA
from lightning_merge.methods.fisher import Fisher
from lightning_merge.methods.greedy_soup import GreedySoup
from lightning_merge.methods.isotropic import IsoC, IsoCTS
from lightning_merge.methods.model_stock import ModelStock
from lightning_merge.methods.projection import OutputProjection
from lightning_merge.methods.regmean import RegMean
from lightning_merge.methods.rules import Coefficient
from lightning_merge.methods.slerp import Slerp
from lightning_merge.methods.stored import ExpertStore
from lightning_merge.methods.tall_store import MaskedExperts, TALLCompress
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import TIES
from lightning_merge.methods.tsv import TSVMerge

__all__ = [
    "DARE",
    "DELLA",
    "TIES",
    "AdaMerging",
    "Average",
    "Breadcrumbs",
    "CalibratedMethod",
    "Calibration",
    "Coefficient",
    "CompressedExperts",
    "Consensus",
    "ExpertStore",
    "Fisher",
    "GreedySoup",
    "IsoC",
    "IsoCTS",
    "MaskedExperts",
    "MergeMethod",
    "ModelStock",
    "OutputProjection",
    "RegMean",
    "Slerp",
    "TALLCompress",
    "TSVCompress",
    "TSVMerge",
    "TaskArithmetic",
    "WeightMethod",
]
