"""The Slurm script in examples/ starts real runs here, with stand-ins for the
cluster.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from train_helpers import lines, wait_until

from cloob.models.runs import list_checkpoints
from support import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.nightly
OPTIONS = (
    "--model tiny-vit --image-size 64 --batch-size 8 --max-bad-fraction 0.2"
    " --device cpu"
)
# Starts what it is given once for each node, hands SIGTERM on to all of them, and ends
# with the worst of their codes.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
option, processors, *words = sys.argv[1:]
assert (option, processors) == ("--cpus-per-task", "72")  # which srun does not take over from sbatch
tasks = [subprocess.Popen(words) for _ in range(int(os.environ["SLURM_NNODES"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/bin/sh
case "$1" in
  show) echo 127.0.0.1; echo elsewhere;;
  requeue) echo "$2" >> "$REQUEUED";;
esac
"""


def replaced(text, *pairs):
    """The text with what belongs to a cluster replaced; each of it has to be there."""
    for before, after in pairs:
        assert before in text, before
        text = text.replace(before, after)
    return text


def environment(**more):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return (
        os.environ
        | {
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        | more
    )


def test_the_slurm_script_requeues_itself_and_goes_on(pairs_as, tmp_path):
    """Two launchers from a stand-in for srun: SIGTERM to the shell, the job requeued,
    and done at the second start.
    """
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "cc3m").mkdir()
    shutil.copy(pairs_as["table"], tmp_path / "cc3m")
    requeued = tmp_path / "requeued"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "72"}
    slurm |= {"SLURM_JOB_NODELIST": "node-[a-b]", "REQUEUED": str(requeued)}
    setting = environment(**slurm)
    setting["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{setting['PATH']}"
    log = tmp_path / "runs" / "cc3m" / "metrics.jsonl"

    def start(epochs):
        changes = (
            ("--nproc-per-node 8", "--nproc-per-node 1"),
            (":29500", f":{free_port()}"),
            ("--workers 8", "--workers 0"),
            ("--save-every 500", f"--save-every 500 --epochs {epochs} {OPTIONS}"),
        )
        (tmp_path / "train.sh").write_text(
            replaced((EXAMPLES / "slurm.sh").read_text(), *changes)
        )
        command, output = ["bash", "train.sh"], subprocess.PIPE
        return subprocess.Popen(
            command,
            cwd=tmp_path,
            env=setting,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start(1000)
    wait_until(lambda: log.is_file() and log.read_text().count("\n") >= 3, first, 300)
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and requeued.read_text() == "7\n", output
    (saved,) = list_checkpoints(log.parent)
    step = int(saved.name[5:])
    assert f"stopped by SIGTERM after step {step}; go on with --resume auto" in output
    epochs = step // 5 + 2
    second = start(epochs)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and requeued.read_text() == "7\n", output
    assert [line["step"] for line in lines(log)] == list(range(1, 5 * epochs + 1))
