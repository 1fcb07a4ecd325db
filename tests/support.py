"""What tests of several folders share beside what they make: processes, their output, a
browser.
"""

import contextlib
import gc
import importlib
import json
import logging
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cloob import cli
from cloob.errors import InputError, TrainingFailed

OPENING = "cloob: opening data …\n"
"""What `cloob train` and `cloob eval` say first."""


def overlaid(*packages):
    """The python of an environment with these packages in front of ours; skips where
    pip cannot install them.
    """
    from benchmarks.overlay import overlay

    try:
        return overlay(packages)
    except RuntimeError as error:
        pytest.skip(f"cannot be installed here: {error}")


def made_once(factory, name, work):
    """A folder that ``work`` has filled, once for all workers of pytest-xdist; the
    others wait for it.
    """
    from filelock import FileLock  # not where torch alone is installed

    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / f"{name}.lock"):
        if not (base / name).exists():
            unfinished = base / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            work(unfinished)
            unfinished.rename(base / name)
    return base / name


def originals(path):
    """A checkpoint that the original program wrote, of the corpus or beside the
    checkout.
    """
    places = [
        Path(__file__).parent / "corpus" / "weights",
        Path(__file__).parents[2] / "shared" / "weights",
    ]
    for place in places:
        if (place / path.removesuffix(":port")).exists():
            return place / path
    pytest.skip(f"{path} is neither in the corpus nor beside the checkout")


def seeded(seed):
    """A generator of torch's."""
    import torch

    return torch.Generator().manual_seed(seed)


def raises(error, match, action, *arguments, **options):
    """The message, which matches, of the error that the action raises; of a user's
    mistake it is one line.
    """
    with pytest.raises(error, match=match) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message or not issubclass(error, InputError | TrainingFailed)
    return message


def exit_code(words):
    """That of ``cloob WORDS``, run in this process; words are a line or a list."""
    if isinstance(words, str):
        words = shlex.split(words)
    return cli.main([str(word) for word in words])


def run_cloob(words, *, code=0):
    """Runs ``cloob WORDS`` in this process, which must end with the code."""
    assert exit_code(words) == code, words


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path):
    """The records of a file that has one a line."""
    text = Path(path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def refused(capsys, words):
    """The one line on stderr of a command, run here, that must exit with 2, beside the
    one that says it begins.
    """
    run_cloob(words, code=2)
    out, err = capsys.readouterr()
    err = err.removeprefix(OPENING)
    assert out == ""
    assert err.startswith("cloob: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def use_hub(monkeypatch, address, cache):
    """Makes another address the Hugging Face hub of this process, and a folder its
    cache.
    """
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
    }
    for key, value in (constants | {"HF_HUB_CACHE": str(cache)}).items():
        monkeypatch.setattr(f"huggingface_hub.constants.{key}", value)
    monkeypatch.setattr(
        "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE",
        template,
        raising=False,
    )


def fill_hub_cache(cache, name, folder):
    """Puts a folder into a cache of the hub, as if it had been fetched before; where it
    lies there.
    """
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return place


def run_script(script, *words, cwd=None):
    """``python -c SCRIPT WORDS`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )


def free_port():
    """A port of 127.0.0.1 that nobody is given by asking for any: it may be bound
    seconds later.
    """
    chance = random.Random()
    while True:
        port = chance.randrange(20_000, 32_768)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


@dataclass
class Ranks:
    """Processes forked from this one, as the ranks of one run; what they print goes
    into files.
    """

    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self):
        """Exit codes of the ranks that have ended, negative for a signal."""
        for i, pid in enumerate(self.pids):
            if i not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[i] = os.waitstatus_to_exitcode(status)
        return self.codes

    def wait(self, limit=120, *, together=False):
        """Exit codes of all ranks; ``together``: one that is killed takes the others
        with it, as a machine does.
        """
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

    def until(self, done, limit=120):
        """Waits for what the ranks bring about."""
        end = time.monotonic() + limit
        while not done():
            assert not self.poll() and time.monotonic() < end, self.told()
            time.sleep(0.01)

    def told(self):
        return "\n".join(path.read_text() for path in self.outputs)


def fork(folder, processes, action):
    """Runs ``action`` in each of some processes, which need no time for imports;
    several are the ranks of a run.
    """
    # What a run imports late would take each of its processes seconds; pyarrow imports
    # pandas where there is one.
    for late in ("torch._dynamo", "pandas"):
        with contextlib.suppress(ImportError):
            importlib.import_module(late)
    from PIL import Image

    Image.init()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    ranks = Ranks([], [folder / f"rank-{rank}.txt" for rank in range(processes)])
    for rank, output in enumerate(ranks.outputs):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12+: a fork with threads about
            pid = os.fork()
        if pid == 0:
            # what the tests have brought would be collected, and so copied, in each
            # process anew
            gc.freeze()
            code = 1
            with contextlib.suppress(BaseException):
                if processes > 1:
                    os.environ.update(
                        environment,
                        RANK=str(rank),
                        LOCAL_RANK=str(rank),
                        WORLD_SIZE=str(processes),
                    )
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


def on_ranks(folder, processes, work, limit=120):
    """What ``work`` returns on each rank of a gloo group."""
    import torch
    import torch.distributed as dist

    def action():
        rank = int(os.environ["RANK"])
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=processes,
        )
        torch.save(work(rank), folder / f"{rank}.pt")
        # a group that DDP still holds when it is destroyed could abort the process
        gc.collect()
        dist.destroy_process_group()

    ranks = fork(folder, processes, action)
    assert set(ranks.wait(limit)) == {0}, ranks.told()
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def torchrun(words, processes):
    """Runs a script in several processes under torchrun, on the CPU."""
    command = ["-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", *map(str, words)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
