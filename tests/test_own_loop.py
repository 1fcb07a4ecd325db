"""docs/own-loop.md: what it says of accumulating and of ranks; its snippets run in ``test_docs.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloob import cached_backward

PAGE = Path(__file__).parents[1] / "docs" / "own-loop.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def scripts() -> dict[str, str]:
    """The blocks that torchrun starts, by the names of their files."""
    return {found[1]: block for block in blocks() if (found := re.match(r"# (\w+\.py): torchrun", block))}


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
    ("name", "objective"), [("train.py", "cloob"), ("train.py", "clip"), ("fsdp.py", "clip"), (WITH_UNUSED, "clip")]
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
