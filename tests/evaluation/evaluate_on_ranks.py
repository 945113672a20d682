"""Run by test_evaluator.py as each of two processes: RANK STORE ROOT LOGITS -> the scores as JSON."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

import multiseg_d2
from multiseg_d2.engine.launch import _leave_group
from multiseg_d2.evaluation import MultiDatasetEvaluator

rank, store, root, logits = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
multiseg_d2.register_dataset(f"{root}/tiny.yaml")
from detectron2.data import DatasetCatalog  # noqa: E402

samples, scores = DatasetCatalog.get("tiny_val"), torch.load(logits, weights_only=True)
evaluator = MultiDatasetEvaluator("tiny_val")
share = slice(0, 3) if rank == 0 else slice(3, None)
evaluator.process(samples[share], [{"sem_seg": x} for x in scores[share]])
results = evaluator.evaluate()
print(json.dumps(results and results["sem_seg"]))
_leave_group()
