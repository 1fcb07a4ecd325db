"""What the tests of this folder share beside fixtures."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloob.train.callbacks import Callback, RunInfo, RunResult
from cloob.train.config import TrainConfig

WORKER = Path(__file__).with_name("train_worker.py")
# Compared between runs that must be the same; the other keys of a line are times.
EXACT = ("step", "epoch", "samples_seen", "loss", "lr", "grad_norm", "inv_tau", "beta")


@dataclass
class Recorder(Callback):
    """Keeps what it was called with."""

    events: list[tuple[str, Any]] = field(default_factory=list)

    def on_start(self, info: RunInfo) -> None:
        self.events.append(("start", info))

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        self.events.append(("step", dict(metrics)))

    def on_epoch_end(self, metrics: Mapping[str, Any]) -> None:
        self.events.append(("epoch", dict(metrics)))

    def on_checkpoint(self, path: Path) -> None:
        self.events.append(("checkpoint", path))

    def on_end(self, result: RunResult | None) -> None:
        self.events.append(("end", result))

    def of(self, kind: str) -> list[Any]:
        return [value for name, value in self.events if name == kind]


@dataclass(frozen=True)
class Trained:
    config: TrainConfig
    run: Path
    result: RunResult
    recorder: Recorder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exact(run: Path) -> list[dict[str, Any]]:
    """What two runs must have in common to the last bit."""
    return [{key: line[key] for key in EXACT} for line in lines(run / "metrics.jsonl")]


@dataclass
class Launcher:
    """Starts ``train_worker.py`` in processes of its own."""

    folder: Path
    configs: Path

    def start(
        self,
        *runs: dict[str, Any],
        launcher: tuple[str, ...] = (),
        new_group: bool = False,
        prefix: tuple[str, ...] = (),
        interface: str = "lo",
    ) -> Any:
        job = self.folder / f"job-{len(list(self.folder.iterdir()))}.json"
        job.write_text(json.dumps({"configs": [str(self.configs)], "runs": list(runs)}))
        command = [*prefix, sys.executable, *launcher, str(WORKER), str(job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": interface}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=new_group,
        )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody is given by asking for any: it may be bound seconds later."""
    chance = random.Random()
    while True:
        port = chance.randrange(20_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@dataclass
class Ranks:
    """Processes forked from this one, as the ranks of one run; what they print goes into files."""

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, negative for a signal."""
        for i, pid in enumerate(self.pids):
            if i not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[i] = os.waitstatus_to_exitcode(status)
        return self.codes

    def wait(self, limit: float = 120, *, together: bool = False) -> list[int]:
        """Exit codes of all ranks; ``together``: one that is killed takes the others with it, as a machine does."""
        end = time.monotonic() + limit
        while len(self.poll()) < len(self.pids):
            late = time.monotonic() > end
            if late or (together and any(code < 0 for code in self.codes.values())):
                for i, pid in enumerate(self.pids):
                    if i not in self.codes:
                        os.kill(pid, signal.SIGKILL)
            assert not late, f"the ranks hang: {self.told()}"
            time.sleep(0.01)
        return [self.codes[i] for i in range(len(self.pids))]

    def told(self) -> str:
        return "\n".join(path.read_text() for path in self.outputs)


def fork(folder: Path, processes: int, action: Callable[[], int | None]) -> Ranks:
    """Runs ``action`` in each of some processes, which need no time for imports; several are the ranks of a run."""
    import torch._dynamo  # noqa: F401 - DDP and optimisers import it, which takes each process seconds

    folder.mkdir(parents=True, exist_ok=True)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = Ranks([], [folder / f"rank-{rank}.txt" for rank in range(processes)])
    for rank, output in enumerate(ranks.outputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: a fork with threads about
            pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                if processes > 1:
                    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
                handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(handle, 1), os.dup2(handle, 2)
                sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
                logging.basicConfig(format="%(message)s", force=True)
                try:
                    code = action() or 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
            os._exit(code)
        ranks.pids.append(pid)
    return ranks


@dataclass
class KilledAfter(Callback):
    """kill -9 to this process some time after a step, in the middle of whatever it does then; on the last rank only."""

    step: int
    seconds: float

    def on_start(self, info: RunInfo) -> None:
        self.last_rank = info.rank == int(os.environ.get("WORLD_SIZE", "1")) - 1

    def on_step(self, metrics: Mapping[str, Any]) -> None:
        if metrics["step"] == self.step and self.last_rank:
            threading.Timer(self.seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        if metrics["step"] >= self.step:
            time.sleep(0.02)


def wait_until(done: Callable[[], bool], process: Any, limit: float = 120) -> None:
    """Waits for something that a process does; fails with its output when it ends before, or takes too long."""
    end = time.monotonic() + limit
    while not done():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(process.communicate(timeout=60)[0])
        time.sleep(0.005)
