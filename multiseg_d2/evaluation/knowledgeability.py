"""How many concepts a model knows: our reading of knowledgeability. numpy only."""

from __future__ import annotations

import numpy as np

__all__ = ["known_concepts"]


def known_concepts(iou: np.ndarray, thresholds: int = 10) -> float:
    """Mean number of classes that are recognised, over a range of what counts as recognised.

    With the thresholds t / (T + 1), t = 1 ... T, the mean of |{c: IoU_c >= threshold_t}|. Unlike a mean IoU it grows
    with the number of classes that a model can tell; for many thresholds it tends to the sum of the IoUs.

    Args:
        iou: (C,) IoU in [0, 1] of every class that is asked for: 0 where the model cannot name it. NaN (no ground truth
            and no prediction) is left out.
        thresholds: T.

    Returns:
        Number of concepts in [0, C].

    Source: the idea of HTSS (2023), "knowledgeability"; its formula is not public, so this one is ours, and its numbers
    are not those of the paper.
    """
    if thresholds < 1:
        raise ValueError(f"at least one threshold is needed, not {thresholds}")
    values = np.asarray(iou, np.float64)
    values = values[~np.isnan(values)]
    levels = np.arange(1, thresholds + 1) / (thresholds + 1)
    return float((values[:, None] >= levels).sum(axis=0).mean())
