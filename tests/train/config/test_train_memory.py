"""Batches that do not fit in memory: one line that names sizes that do, before the first step or where one fails."""

from __future__ import annotations

import copy
import gc
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_mount import trained_until
from torch import Tensor
from train_helpers import Trained, lines

from cloob.cli import main
from cloob.data.batch import Batch
from cloob.errors import InputError
from cloob.models.runs import list_checkpoints
from cloob.models.towers import create_model
from cloob.objective import make_objective
from cloob.train.config import TrainConfig, memory
from cloob.train.loop import train
from cloob.train.step import Stepper, TowersWithLoss
from support import fork


@pytest.fixture(scope="module")
def many(pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """512 pairs, of a few pictures."""
    table = tmp_path_factory.mktemp("many") / "many.csv"
    rows = [f"{pairs_folder}/00.png\tcaption {n}" for n in range(512)]
    table.write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return str(table)


def address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def leave(size: int) -> None:
    """Lets this process have no more than so many bytes beside those that it has."""
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + size, resource.RLIM_INFINITY))


def test_a_run_that_would_not_fit_is_refused_before_its_first_step(
    base: TrainConfig, many: str, tmp_path: Path
) -> None:
    """The line's sizes fit: with either of them the run goes through under the same limit."""
    run = tmp_path / "run"
    config = base.override(data=[many], model="tiny-vit", batch_size=512, epochs=1, out=run)
    (tmp_path / "config.json").write_text(config.to_json())

    def command(*words: str) -> Any:
        def action() -> int:
            leave(800_000_000)
            return main(["train", "--config", str(tmp_path / "config.json"), *words])

        return action

    ranks = fork(tmp_path / "first", 1, command())
    assert ranks.wait() == [2], ranks.told()
    assert ranks.told().splitlines()[0] == "cloob: opening data …"
    said = [line for line in ranks.told().splitlines() if "more memory" in line]
    match = re.fullmatch(
        r"cloob: tiny-vit with 512 pairs at a time takes about \d\.\d GB more memory, 0\.\d GB are free: "
        r"give --micro-batch-size (\d+) \(the loss stays that of the whole batch\), or --batch-size \1",
        said[0],
    )
    assert match and len(said) == 1 and "Traceback" not in ranks.told(), ranks.told()
    assert not run.exists()
    for option, more in (("--micro-batch-size", ()), ("--batch-size", ("--overwrite",))):
        ranks = fork(tmp_path / option, 1, command(option, match[1], *more))
        assert ranks.wait() == [0], ranks.told()


def test_memory_that_runs_out_at_a_step_is_one_line(base: TrainConfig, many: str, tmp_path: Path) -> None:
    """torch's "DefaultCPUAllocator: can't allocate memory": the checkpoint before stays."""
    run = tmp_path / "run"
    config = base.override(data=[many], model="tiny-vit", batch_size=512, epochs=4, out=run)

    def run_out() -> None:  # in the process of the run; what earlier steps have freed could suffice for another one
        leave(120_000_000)
        step = Stepper.__call__

        def larger_step(self: Stepper, *arguments: Any, **options: Any) -> Any:
            torch.empty(10**10, dtype=torch.uint8)
            return step(self, *arguments, **options)

        Stepper.__call__ = larger_step  # type: ignore[method-assign]

    ranks = trained_until(tmp_path / "first", config, 2, run_out)
    assert ranks.codes == {0: 2}, ranks.told()
    said = ranks.told().splitlines()[-1]
    assert re.match(r"cloob: tiny-vit .* --batch-size \d+$", said), ranks.told()
    assert "Traceback" not in ranks.told()
    assert len(lines(run / "metrics.jsonl")) == 2
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002"]


def test_a_gpu_s_error_is_one_line(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for CUDA's error; nothing of the failed step is left."""
    step = Stepper.__call__
    steppers: list[Stepper] = []

    def fails(self: Stepper, *arguments: Any, **options: Any) -> Any:
        steppers.append(self)
        if len(steppers) <= 3:
            return step(self, *arguments, **options)
        for parameter in self.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(Stepper, "__call__", fails)
    monkeypatch.setattr(memory, "available", lambda device: 0.0)
    monkeypatch.setattr(memory, "check", lambda *_: None)
    with pytest.raises(InputError, match=r"nano-dropout with 8 pairs at a time .* not even 2 pairs fit; give a"):
        train(trained.config.override(out=tmp_path / "run"))
    assert all(parameter.grad is None for parameter in steppers[-1].module.parameters() if parameter.requires_grad)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_other_errors_of_a_step_are_no_want_of_memory(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Stepper, "__call__", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(trained.config.override(out=tmp_path / "run"))


def make(name: str, pairs: int) -> tuple[Stepper, Batch]:
    encoder = create_model(name, seed=0)
    module = TowersWithLoss(encoder, make_objective("cloob")).train()
    size = encoder.image_size
    images = torch.randn(pairs, 3, size, size)
    tokens = torch.ones(pairs, encoder.context_length, dtype=torch.int64)
    batch = Batch(images, tokens, torch.arange(pairs), tuple(map(str, range(pairs))), ())
    return Stepper(module, torch.optim.AdamW(module.parameters())), batch


@pytest.mark.parametrize("name", ["nano-dropout", "nano-resnet"])
def test_measuring_changes_nothing_and_counts_each_pair(nano_configs: Path, name: str) -> None:
    stepper, batch = make(name, 2)
    before, state = copy.deepcopy(stepper.module.state_dict()), torch.get_rng_state()
    need = memory.measure(stepper, batch.images, batch.tokens)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in stepper.module.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in stepper.module.parameters())
    trained = sum(p.numel() * 4 for p in stepper.module.parameters() if p.requires_grad)
    assert need.fixed == 3 * trained  # gradients and two moments
    stepper(batch.images, batch.tokens, None, 1e-3)
    assert memory.measure(stepper, batch.images, batch.tokens).fixed == trained

    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    stepper, batch = make(name, 16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = stepper.module(batch.images, batch.tokens, loss=False)
    weights = {p.untyped_storage().data_ptr() for p in stepper.module.parameters()}
    real = sum(size for pointer, size in kept.items() if pointer not in weights)
    assert real <= 16 * need.pair <= 1.5 * real and len(features) == 2


def test_sizes_that_fit_are_powers_of_two() -> None:
    need = memory.Need(fixed=100, pair=10)
    assert need.of(8) == 180
    assert [need.fitting(room) for room in (179, 180, 500, 120, 119, 0)] == [4, 8, 32, 2, 0, 0]


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/pod/run\n", ("pod/memory.max", "pod/memory.current", "pod/memory.stat")),
        (
            "5:cpu:/x\n4:memory:/pod\n",
            ("memory/pod/memory.limit_in_bytes", "memory/pod/memory.usage_in_bytes", "memory/pod/memory.stat"),
        ),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path: Path, membership: str, files: tuple[str, ...]) -> None:
    """Of the group or of one above it, in both versions of the kernel's interface; pages of files can go."""
    for name, content in zip(files, ("1000\n", "600\n", "anon 500\ninactive_file 70\n"), strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "cgroup").write_text(membership)
    assert memory._free_of_groups(tmp_path, tmp_path / "cgroup") == [470]
    assert memory._free_of_groups(tmp_path, tmp_path / "none") == []
