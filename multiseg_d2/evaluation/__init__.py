"""Scores of predicted label maps: counting, official rules, reports and pictures."""

from __future__ import annotations
