"""datasets/prepare_cityscapes.py: train ids against the official table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from label_files import ids_in, save

FOLDER = Path(__file__).resolve().parent.parent.parent / "datasets"


def test_cityscapes_train_ids_are_those_of_the_official_table(script, tmp_path):
    from cityscapesscripts.helpers.labels import labels

    source = save(
        tmp_path / "cityscapes/gtFine/val/ulm/ulm_0_gtFine_labelIds.png", np.arange(34, dtype=np.uint8).reshape(2, 17)
    )
    assert script("prepare_cityscapes").main(["--root", str(tmp_path), "--workers", "1"]) == 0
    drawn = ids_in(source.with_name("ulm_0_gtFine_labelTrainIds.png")).ravel()
    assert drawn.tolist() == [next(label.trainId for label in labels if label.id == i) & 255 for i in range(34)]
