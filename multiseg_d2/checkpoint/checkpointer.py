"""Checkpoints of a run: which to write, which to trust, and what must agree before a run goes on."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from .file import (
    BrokenCheckpointError,
    CheckpointError,
    read_checkpoint,
    write_checkpoint,
    write_file,
)
from .resume import ResumeError, differences, state_differences
from .weights import load_weights

__all__ = ["AtomicCheckpointer"]

logger = logging.getLogger(__name__)

_NONE_YET = "none"  # in the file last_checkpoint
_PERIODIC = re.compile(r"model_\d{7,}\.pth")  # as Detectron2 names them


class AtomicCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with files that are whole, checked, and free of code.

    A file holds ``model`` (tensors by name), one entry per checkpointable, what :meth:`save` is given, and ``run``: the
    facts of the run (datasets and their class names, schedule, seed, number of processes), which must be the same in
    the run that resumes.

    Args:
        model: the model, or its ``DistributedDataParallel`` wrapper.
        save_dir: the output folder.
        run: facts of the run, plain values; None for one that a resumed run takes over from the checkpoint.
        keep: how many of the periodic checkpoints (``model_0004999.pth``) to keep.
        save_to_disk: default: on the main process only.
        checkpointables: objects with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        run: Mapping[str, Any] | None = None,
        keep: int = 3,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.run = dict(run or {})
        self.keep = keep
        self._own: list[str] = []  # periodic checkpoints of this run, oldest first: those of others are not deleted

    def save(self, name: str, **extra: Any) -> None:
        """Writes ``<name>.pth`` and makes it the last checkpoint; returns on all processes when it is on disk.

        Args:
            name: file name without ``.pth``.
            extra: further plain values to store.

        Raises:
            CheckpointError: it could not be written; the message has the bytes needed. Older files are untouched.
        """
        if self.save_dir and self.save_to_disk:
            path = Path(self.save_dir, f"{name}.pth")
            self._own = [own for own in self._own if own != path.name]
            self._own += [path.name] if _PERIODIC.fullmatch(path.name) else []
            content = {"model": dict(self.model.state_dict()), "run": self.run, "kept": self._own}
            content.update((key, item.state_dict()) for key, item in self.checkpointables.items())
            content.update(extra)
            self._remove_leftovers()
            write_checkpoint(path, content)
            self.tag_last_checkpoint(path.name)
            logger.info("saved checkpoint %s", path)
            self._remove_old()
        comm.synchronize()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the last checkpoint in the file ``last_checkpoint``, where Detectron2 looks for it."""
        write_file(Path(self.save_dir, "last_checkpoint"), last_filename_basename, needed=len(last_filename_basename))

    def start_anew(self) -> None:
        """Says that checkpoints in the folder are an earlier run's: this one is not to be resumed from them."""
        if self.save_to_disk and self._files():
            logger.warning("%s has checkpoints of an earlier run, which --resume will not use", self.save_dir)
            self.tag_last_checkpoint(_NONE_YET)
        comm.synchronize()

    def has_checkpoint(self) -> bool:
        """Whether the output folder has a checkpoint, readable or not. The main process's answer on all of them."""
        return comm.all_gather(bool(self._candidates()))[0]

    def get_checkpoint_file(self) -> str:
        """Path of the newest checkpoint that is whole, "" if there is none. The main process's answer on all of them.

        Raises:
            CheckpointError: there are checkpoints, and all of them are broken.
        """
        found, problems = "", []
        for path in self._candidates() if comm.is_main_process() else []:
            try:
                read_checkpoint(path)
            except BrokenCheckpointError as problem:
                logger.error("%s. Trying the checkpoint before it", problem)
                problems.append(str(problem))
            except CheckpointError as problem:
                problems.append(str(problem))
                break
            else:
                found = str(path)
                break
        found, problems = comm.all_gather((found, problems))[0]
        if problems and not found:
            raise CheckpointError("no checkpoint to resume from:\n" + "\n".join(problems))
        return found

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Loads the weights in ``path`` into the model, and nothing else; see :func:`load_weights`."""
        load_weights(self.model, path)
        return {}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the newest whole checkpoint, or starts from the weights in ``path``.

        Returns:
            What the file holds beside the model and the checkpointables; nothing where it did not resume.

        Raises:
            CheckpointError: no checkpoint can be used, or ``path`` cannot.
            ResumeError: it is from a run with other datasets, classes, schedule, seed or number of processes.
        """
        if resume and self.has_checkpoint():
            return self.resume(self.get_checkpoint_file())
        return self.load(path)

    def resume(self, path: str) -> dict[str, Any]:
        """Loads everything in a checkpoint of this very run; see :meth:`resume_or_load`."""
        if not all(comm.all_gather(os.path.isfile(path))):
            raise CheckpointError(f"{path} is not visible on all machines: OUTPUT_DIR must be a folder that all share")
        content = read_checkpoint(Path(path))
        if "run" not in content or "model" not in content:
            raise ResumeError(f"{path} holds weights only; start a new run from it with MODEL.WEIGHTS")
        fixed = {key: value for key, value in self.run.items() if value is not None}
        # A fact that an older version did not write down is not compared.
        problems = differences({key: content["run"].get(key, now) for key, now in fixed.items()}, fixed)
        problems += state_differences(content["model"], self.model.state_dict())
        problems += [f"the file lacks {key!r}" for key in self.checkpointables if key not in content]
        if problems:
            raise ResumeError(
                f"{path} is from another run:\n"
                + "\n".join(f"  - {p}" for p in problems)
                + f"\nUndo the change to resume, or start a new run from its weights: MODEL.WEIGHTS {path} and a new "
                "OUTPUT_DIR"
            )
        self.model.load_state_dict(content.pop("model"))
        for key, item in self.checkpointables.items():
            item.load_state_dict(content.pop(key))
        self.run, self._own = content["run"], content.pop("kept", [])
        logger.info("resumed from %s", path)
        return content

    def _files(self) -> list[Path]:
        """All checkpoints in the folder, last written first."""
        folder = Path(self.save_dir or "/nonexistent")
        files = [path for path in folder.glob("*.pth") if path.is_file()] if folder.is_dir() else []
        return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)

    def _candidates(self) -> list[Path]:
        """Checkpoints to try, best first: the last one saved, then the others by age."""
        files = self._files()
        tag = Path(self.save_dir, "last_checkpoint")
        name = tag.read_bytes().decode(errors="replace").strip() if tag.is_file() else ""  # of any bytes, after a crash
        tagged = Path(self.save_dir, name) if name else None
        if tagged is not None and tagged.name == _NONE_YET:
            return []
        return sorted(files, key=lambda path: path != tagged)

    def _remove_leftovers(self) -> None:
        """Temporary files of a process that was killed while it wrote."""
        for path in Path(self.save_dir).glob(".*.pth.*.tmp"):
            path.unlink(missing_ok=True)

    def _remove_old(self) -> None:
        for name in self._own[: -self.keep]:
            Path(self.save_dir, name).unlink(missing_ok=True)
        self._own = self._own[-self.keep :]
