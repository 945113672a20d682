"""One picture in four label spaces: cells to step through (`# %%`), or to run as a whole in a minute on a CPU.

    python examples/four_label_spaces.py

Drawn pictures only, nothing is downloaded. EXAMPLE_STEPS and EXAMPLE_OUTPUT set how long it trains and where it writes.
"""

# %% [markdown]
# Three datasets say different things about the same street: one has a class for riders, one tells motorcyclists from
# bicyclists, one calls both persons. A model with one head over the union of all classes learns from the three and
# answers in the classes of any, also in those of a fourth that it was never trained on.

# %% Where everything goes, and the drawn pictures
from __future__ import annotations

import os
from pathlib import Path

import multiseg_d2  # noqa: F401  isort: skip  (first: it lets Detectron2 be imported)

import cv2
from detectron2.data import MetadataCatalog

from multiseg_d2.engine import Predictor, Trainer, load_config, register_config
from multiseg_d2.engine.shared_model import write_shared_model
from multiseg_d2.evaluation import pictures
from multiseg_d2.label_space import RELATION_NAMES, relation
from multiseg_d2.toy import write_toy

OUTPUT = Path(os.environ.get("EXAMPLE_OUTPUT", "output/four_label_spaces"))
STEPS = os.environ.get("EXAMPLE_STEPS", "20")
os.environ["DETECTRON2_DATASETS"] = str(OUTPUT / "datasets")
write_toy(OUTPUT / "datasets", images=16)
SPACES = ("toy_day", "toy_dusk", "toy_rain", "toy_concepts")

# %% A config: null BCE over the union of three label spaces (UniSeg)
cfg = load_config(
    "configs/uniseg/toy.yaml",
    ["SOLVER.MAX_ITER", STEPS, "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(OUTPUT)]
    + ["DATASETS.TEST", "('toy_day_val[:2]', 'toy_concepts_day[:2]')", "TEST.NUM_PICTURES", "0"],
)
register_config(cfg)

# %% How the label spaces relate: what `rider` and `vehicle` of one are to the classes of another
entries = {"toy_day": "toy_day_val", "toy_dusk": "toy_dusk_val", "toy_rain": "toy_rain_val"}
space_of = {name: MetadataCatalog.get(entry).label_space for name, entry in entries.items()}
for first, second, name in (("toy_day", "toy_dusk", "rider"), ("toy_rain", "toy_day", "vehicle")):
    codes = relation(space_of[first], space_of[second])[space_of[first].classes.index(name)]
    for other, code in zip(space_of[second].classes, codes):
        if code:
            print(f"{first} {name!r} is {RELATION_NAMES[code]} of {second} {other!r}")

# %% Train
OUTPUT.mkdir(parents=True, exist_ok=True)
trainer = Trainer(cfg)
trainer.resume_or_load(resume=False)
trainer.train()

# %% One small file, with the label spaces inside
cfg.MODEL.WEIGHTS = str(OUTPUT / "model_final.pth")
size = write_shared_model(cfg, OUTPUT / "shared.pth")
print(f"shared.pth: {size / 1e6:.1f} MB")

# %% One picture in four label spaces; the fourth is known to the union only
picture = cv2.imread(str(next((OUTPUT / "datasets/toy/day/images/val").glob("*.jpg"))))[..., ::-1]
labelled = {}
for name in SPACES:
    predictor = Predictor.from_checkpoint(OUTPUT / "shared.pth", name)
    space = predictor.space
    labelled[f"{name}: {space.num_classes} classes"] = (predictor(picture), space.classes, space.colors)
pictures.save(pictures.in_label_spaces(picture, labelled), OUTPUT / "four_label_spaces.png")
print(f"see {OUTPUT / 'four_label_spaces.png'}")
