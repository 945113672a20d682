"""Scores of predicted label maps: counting, official rules, reports and pictures."""

from __future__ import annotations

from .evaluator import EvaluationError, MultiDatasetEvaluator, build_evaluator
from .report import write_report
from .scores import Coverage, with_means

__all__ = ["Coverage", "EvaluationError", "MultiDatasetEvaluator", "build_evaluator", "with_means", "write_report"]
