"""docs/own-loop.md: its snippets run, and each message of its table is one that is raised."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from cloob import ContrastiveObjective, cached_backward
from cloob.functional.checks import as_rows

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"
TESTS = Path(__file__).parent


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def scripts() -> dict[str, str]:
    """The blocks that torchrun starts, by the names of their files."""
    return {found[1]: block for block in blocks() if (found := re.match(r"# (\w+\.py): torchrun", block))}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute")
@pytest.mark.usefixtures("fresh_compiler")
def test_the_snippets_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one namespace; compiled without inductor, which takes a C++ compiler and half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    names: dict[str, Any] = {}
    for block in blocks():
        if block not in scripts().values():
            exec(compile(block, str(PAGE), "exec"), names)
    expected = names["objective"](*names["features"])
    torch.testing.assert_close(names["program"].module()(*names["features"]), expected)
    torch.testing.assert_close(names["loss"], expected)
    # Of a hash that each process salts for itself it would be another number.
    assert names["ids"].tolist()[0] == 6164512276740585205


def test_accumulating_is_not_a_larger_batch_and_caching_is() -> None:
    """What the page says of both, for the towers that it has."""
    names: dict[str, Any] = {}
    exec(compile(blocks()[0], str(PAGE), "exec"), names)
    towers, objective = names["towers"], names["objective"]
    images, texts = torch.randn(32, 64), torch.randn(32, 48)
    parts = list(zip(images.split(8), texts.split(8), strict=True))

    def gradient(backward: Callable[[], object]) -> torch.Tensor:
        towers.zero_grad()
        backward()
        return towers.image.weight.grad.clone()

    whole = gradient(lambda: objective(*towers(images, texts)).backward())
    cached = gradient(lambda: cached_backward(lambda part: towers(*part), objective, parts, towers=towers))
    added = gradient(lambda: [(objective(*towers(*part)) / 4).backward() for part in parts])
    torch.testing.assert_close(cached, whole)
    assert (added - whole).norm() > 0.1 * whole.norm()


WITH_UNUSED = "find_unused_parameters=True"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("train.py", "clip"),
        ("fsdp.py", "clip"),
        (WITH_UNUSED, "clip"),
        ("train.py", "cloob"),
        ("fsdp.py", "cloob"),
    ],
)
def test_two_ranks_print_what_one_does(name: str, objective: str, tmp_path: Path) -> None:
    script = loss_inside(scripts()["train.py"]) if name == WITH_UNUSED else scripts()[name]
    (tmp_path / "script.py").write_text(script, encoding="utf-8")

    def losses(ranks: int) -> list[float]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run(
            [*launcher, "script.py", objective],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=240,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return [float(number) for number in re.findall(r"^step \d: loss (\S+)$", done.stdout, flags=re.MULTILINE)]

    one, two = losses(1), losses(2)
    assert len(one) == 3 and len(set(one)) == 3
    # The third loss is after two updates: with another gradient it would be another one.
    assert two == pytest.approx(one, rel=1e-4)


def loss_inside(script: str) -> str:
    """The script with ``find_unused_parameters``, as the page says that it goes: ``forward`` returns the loss."""
    for line, other in (
        ("DistributedDataParallel(model)", f"DistributedDataParallel(model, {WITH_UNUSED})"),
        (
            "return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)",
            "return self.objective(F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1))",
        ),
        ("model.objective(*ddp(images, texts))", "ddp(images, texts)"),
        ("if step < 2:", "if True:"),
    ):
        assert line in script
        script = script.replace(line, other)
    return script


def rows(n: int = 8, width: int = 5) -> torch.Tensor:
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(n)), dim=1)


def spoilt(value: float) -> torch.Tensor:
    return rows().index_fill(0, torch.tensor([3]), value)


def loaded() -> None:
    ContrastiveObjective(inv_tau=30.0).load_state_dict(ContrastiveObjective(inv_tau=20.0).state_dict())


def written() -> None:
    objective = ContrastiveObjective()
    objective.fixed_beta.fill_(2.0)
    objective.state_dict()


def twice_differentiated() -> None:
    x = rows().requires_grad_()
    torch.autograd.grad(ContrastiveObjective(backend="streamed")(x, rows()), x, create_graph=True)


def learned_scale() -> None:
    ContrastiveObjective()(rows(), rows(), torch.tensor(30.0, requires_grad=True))


OBJECTIVE = ContrastiveObjective()
# What raises each message of the table; of those that need ranks, the test of test_distributed.py that sees them.
RAISED_BY: dict[str, Callable[[], object] | str] = {
    "rows are bad; row 3 is not finite": lambda: OBJECTIVE(spoilt(torch.nan), rows()),
    "rows are bad; row 3 is zero": lambda: OBJECTIVE(rows(), spoilt(0.0)),
    "has rows of length": lambda: ContrastiveObjective()(3 * rows(), rows()),
    "a floating-point matrix (N, D) is expected": lambda: OBJECTIVE(rows()[0], rows()),
    "has embedding dimension": lambda: OBJECTIVE(rows(), rows(width=6)),
    "has dtype": lambda: OBJECTIVE(rows(), rows().double()),
    "has device": lambda: as_rows(image_features=rows(), text_features=rows().to("meta")),
    "a contrast needs at least 2": lambda: OBJECTIVE(rows(1), rows(1)),
    "equally many, at least 1": "test_a_mistake_on_one_rank_is_raised_on_all",
    "integers are expected": lambda: OBJECTIVE(rows(), rows(), ids=torch.arange(7)),
    "gather=True needs a process group": lambda: ContrastiveObjective(gather=True)(rows(), rows()),
    "ranks differ in": "test_a_mistake_on_one_rank_is_raised_on_all",
    "rank 1: ": "test_a_mistake_on_one_rank_is_raised_on_all",
    "learnable_inv_tau=True needs scale='unit'": lambda: ContrastiveObjective(learnable_inv_tau=True, scale="paper"),
    "logit_scale learns, which needs scale='unit'": learned_scale,
    "goes through neither torch.func": lambda: torch.func.grad(ContrastiveObjective(backend="streamed"))(
        rows(), rows()
    ),
    "gathering over ranks goes through no": "test_a_mistake_on_one_rank_is_raised_on_all",
    "can be differentiated once": twice_differentiated,
    "as in the state that was loaded": loaded,
    "fixed_beta was set to": written,
    "no micro-batches": lambda: cached_backward(lambda part: part, OBJECTIVE, [], towers=OBJECTIVE),
}


def test_the_table_names_each_message() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## What each error means")[1]
    assert set(re.findall(r"^\| `(.+?)`", table, flags=re.MULTILINE)) == set(RAISED_BY)


@pytest.mark.parametrize("message", RAISED_BY)
def test_a_message_of_the_table_is_raised(message: str) -> None:
    raise_it = RAISED_BY[message]
    if isinstance(raise_it, str):
        source = (TESTS / "test_distributed.py").read_text(encoding="utf-8")
        assert f"def {raise_it}(" in source and message.replace("rank 1", "rank {last}") in source
        return
    with pytest.raises(Exception, match=re.escape(message)):  # a warning is raised too, see pyproject.toml
        raise_it()
