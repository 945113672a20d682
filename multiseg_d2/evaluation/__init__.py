"""Scores of predicted label maps: counting, official rules, reports and pictures."""

from __future__ import annotations

from .evaluator import EvaluationError, MultiDatasetEvaluator, build_evaluator
from .report import write_report

__all__ = ["EvaluationError", "MultiDatasetEvaluator", "build_evaluator", "write_report"]
