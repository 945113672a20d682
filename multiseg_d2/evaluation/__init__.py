"""Scores of predicted label maps: counting, official rules, reports and pictures."""

from __future__ import annotations

from .evaluator import EvaluationError, MultiDatasetEvaluator, build_evaluator

__all__ = ["EvaluationError", "MultiDatasetEvaluator", "build_evaluator"]
