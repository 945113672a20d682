"""Tiny runs: in this process, or in processes of their own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

from multiseg_d2.engine.setup import argument_parser, setup

TIMEOUT = 200  # seconds; what is waited for takes a few, and a hang would take half an hour


@pytest.fixture(scope="session")
def fork_context():
    """A process that has everything imported and does nothing but fork: a run of its own starts at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run", "launch_probe"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks on its own path, and says nothing if in vain
        patch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, str(tiny_run.ROOT)]))
        multiprocessing.forkserver.ensure_running()
    return context


@dataclass
class Started:
    """Processes of a run."""

    processes: list
    logs: list[Path]

    def wait(self) -> list[int]:
        """Exit codes; fails where the processes hang."""
        for process in self.processes:
            process.join(TIMEOUT)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in codes, f"still running after {TIMEOUT} s:\n{self.text()}"
        return codes

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """Data root with the tiny datasets and ``tiny.yaml``."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_run.write_tiny(root)
    return root


@pytest.fixture
def tiny_argv(tiny_root, tmp_path, monkeypatch):
    """Command line of a tiny run, with arguments as of train_net.py; output goes to tmp_path/``out``."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_root))

    def argv(*arguments, out: str = "out") -> list[str]:
        options = [a for a in arguments if str(a).startswith("--")]
        keys = [str(a) for a in arguments if not str(a).startswith("--")]
        return ["--config-file", str(tiny_root / "tiny.yaml"), *options, "OUTPUT_DIR", str(tmp_path / out), *keys]

    return argv


@pytest.fixture
def tiny_cfg(tiny_argv):
    """The checked config of a tiny run."""
    return lambda *arguments, **options: setup(argument_parser().parse_args(tiny_argv(*arguments, **options)))


@pytest.fixture
def tiny_train(tiny_argv):
    """Runs a tiny run in this process and returns its output folder."""

    def train(*arguments, out: str = "out") -> Path:
        argv = tiny_argv(*arguments, out=out)
        assert tiny_run.run(argv) == 0
        return Path(argv[argv.index("OUTPUT_DIR") + 1])

    return train


@pytest.fixture
def refused(tiny_argv, capsys):
    """Runs a tiny run whose config cannot be used, and returns the message."""

    def train(*arguments) -> str:
        capsys.readouterr()
        assert tiny_run.run(tiny_argv(*arguments)) == 2
        return capsys.readouterr().err

    return train


@pytest.fixture
def start(tiny_argv, tmp_path, fork_context):
    """Starts a tiny run in one process or several that meet as torchrun's do."""
    started: list[Started] = []

    def begin(*arguments, out: str = "out", fault: str = "", processes: int = 1) -> Started:
        argv = tiny_argv(*arguments, out=out)
        inherited = ("DETECTRON2_DATASETS", "TINY_ROUNDS")
        shared = {"TINY_FAULT": fault} | {name: os.environ[name] for name in inherited if name in os.environ}
        if processes > 1:
            shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        run = Started([], [])
        for rank in range(processes):
            own = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
            run.logs.append(tmp_path / f"{out}_{len(started)}_{rank}.log")
            target = (argv, own, str(run.logs[-1]))
            run.processes.append(fork_context.Process(target=tiny_run.run_redirected, args=target))
            run.processes[-1].start()
        started.append(run)
        return run

    yield begin
    for run in started:
        for process in run.processes:
            process.kill()


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
