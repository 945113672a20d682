"""Self-training in rounds (CBST, CRST): thresholds, selection, pseudo-labels, the hook."""

from __future__ import annotations
