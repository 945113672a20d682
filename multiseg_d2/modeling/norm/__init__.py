"""Batch norms per dataset: the layer, conversion of a built model, and what a dataset outside the training uses."""

from __future__ import annotations

from .conversion import (
    add_dataset_branch,
    apply_dataset_norm,
    convert_dataset_norm,
    dataset_norms,
    norm_report,
    single_dataset_model,
)
from .dataset_norm import DatasetBatchNorm2d, DatasetBranchError
from .sharing import SHARING, is_per_dataset, sharing_problems, with_plain_norms
from .statistics import Show
from .unseen import CHOICES, UnseenChoice, is_unseen, unseen_dataset

__all__ = [
    "CHOICES",
    "SHARING",
    "Show",
    "DatasetBatchNorm2d",
    "DatasetBranchError",
    "UnseenChoice",
    "add_dataset_branch",
    "apply_dataset_norm",
    "convert_dataset_norm",
    "dataset_norms",
    "is_per_dataset",
    "is_unseen",
    "norm_report",
    "sharing_problems",
    "single_dataset_model",
    "unseen_dataset",
    "with_plain_norms",
]
