"""Memory that runs out at a step is one line that says what to give."""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import pytest
import torch
from test_train_mount import trained_until
from train_helpers import Trained, lines

from cloob.errors import InputError
from cloob.models.runs import list_checkpoints
from cloob.training.config import TrainConfig
from cloob.training.loop import train
from cloob.training.step import TowersWithLoss


def leave(size: int) -> None:
    """Lets this process have no more than so many bytes beside those that it has."""
    gc.collect()
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + size, resource.RLIM_INFINITY))


def test_memory_that_runs_out_at_a_step_is_one_line(base: TrainConfig, tmp_path: Path) -> None:
    """torch's "DefaultCPUAllocator: can't allocate memory": the checkpoint before stays."""
    run = tmp_path / "run"

    def run_out() -> None:  # in the process of the run; what earlier steps have freed could suffice for another one
        leave(120_000_000)
        TowersWithLoss.forward = lambda *_, **__: torch.empty(10**10)  # type: ignore[assignment, method-assign]

    ranks = trained_until(tmp_path / "first", base.override(out=run), 2, run_out)
    assert ranks.codes == {0: 2}, ranks.told()
    said = ranks.told().splitlines()[-1]
    assert said.startswith("cloob: 8 pairs at a time do not fit in memory; give --micro-batch-size 4 or less"), said
    assert "Traceback" not in ranks.told()
    assert len(lines(run / "metrics.jsonl")) == 2
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]


@pytest.mark.parametrize(
    ("error", "seen", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), InputError, "4 pairs at a time"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "mat1 and mat2"),
    ],
)
def test_a_gpu_s_error_is_one_line_and_other_errors_are_what_they_are(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    seen: type[Exception],
    said: str,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TowersWithLoss, "forward", fails)
    with pytest.raises(seen, match=said):
        train(trained.config.override(out=tmp_path / "run", micro_batch_size=4))
