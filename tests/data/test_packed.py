"""Dataset dicts as one block of bytes: the same dicts, and memory for little more than the block; a million of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc

import pytest
from detectron2.data import DatasetFromList

from multiseg_d2.data.packed import PackedDicts


def records(count: int) -> list[dict]:
    return [
        {"file_name": f"/data/images/{i:06d}.png", "image_id": f"{i:06d}", "boxes": [i, i + 1]} for i in range(count)
    ]


def test_it_gives_what_detectron2s_list_gives():
    given = records(50)
    packed, theirs = PackedDicts(given), DatasetFromList(given)
    assert len(packed) == 50 and list(packed) == given == [theirs[i] for i in range(50)]
    assert packed[-1] == given[-1] and packed[3] is not packed[3]
    with pytest.raises(IndexError):
        packed[50]
    assert len(PackedDicts([])) == 0 and list(PackedDicts([])) == []


def test_packing_takes_little_more_memory_than_the_block():
    given = records(20_000)

    def peak(pack) -> int:
        tracemalloc.start()
        try:
            kept = pack(given)
            return tracemalloc.get_traced_memory()[1] + 0 * len(kept)
        finally:
            tracemalloc.stop()

    assert peak(PackedDicts) < 0.5 * peak(lambda dicts: DatasetFromList(dicts, copy=False))


# A process of its own, as memory is that of the whole process. Images and labels are paths that only the walk over the
# folders knows; all that follows is what a run does: pairing, dataset dicts, packing, the schedule, the first step.
START = """
import json, os, resource, sys, time
from pathlib import Path
from detectron2.config import get_cfg
from multiseg_d2 import add_multiseg_config
from multiseg_d2.data import loader, pairing, register

folder, count = Path(sys.argv[1]), int(sys.argv[2])

def walk(folder, above=()):
    ending = "_leftImg8bit.png" if folder.endswith("images/train") else "_gtFine_labelIds.png"
    for i in range(count):
        j = i * 7919 % count  # file systems list in no order
        yield f"{folder}/city{j % 50:02d}/city{j % 50:02d}_{j:06d}_{j % 30:06d}{ending}"

pairing._walk = walk
cfg = get_cfg()
add_multiseg_config(cfg)
cfg.DATASETS.SPECS, cfg.DATASETS.TRAIN, cfg.SEED = [str(folder / "many.yaml")], ("many_train",), 1
cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR = 0, str(folder / "out")
began = time.process_time()
register.register_from_config(cfg)
step = next(iter(loader.build_train_loader(cfg, mapper=lambda record, rng: dict(record))))
seconds, peak = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "MB": peak, "names": [s["file_name"] for s in step]}))
"""
SPEC = """
name: many
encoding: index
annotation: pixel
ignore: [255]
classes: [{name: a, color: [0, 0, 0], raw: [0]}, {name: b, color: [1, 0, 0], raw: [1]}]
splits:
  train: {images: "many/images/train/{id}_leftImg8bit.png", labels: "many/labels/train/{id}_gtFine_labelIds.png"}
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_images_are_started_on_in_a_minute_and_two_gigabytes(tmp_path, monkeypatch):
    """Processor time, which a busy machine does not change."""
    for kind in ("images", "labels"):
        (tmp_path / "many" / kind / "train").mkdir(parents=True)
    (tmp_path / "many.yaml").write_text(SPEC)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    command = [sys.executable, "-c", START, str(tmp_path), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert len(set(found["names"])) == len(found["names"]) > 1
    assert found["seconds"] < 60 and found["MB"] < 2000
