"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from cloob.commands.arguments import parse
from cloob.errors import InputError


@dataclass(frozen=True)
class EvalArguments:
    """Zero-shot classification, retrieval and geometry of one or several models, side by side."""

    models: tyro.conf.Positional[tuple[str, ...]]
    """Run or checkpoint folders, open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: CLIP_benchmark WebDataset folders, folders with one sub-folder a class, or demo:noto-emoji."""
    retrieval: tuple[str, ...] = ()
    """Image-caption pairs: whatever `cloob train --data` reads, or demo:val."""
    out: Path = Path("runs/eval")
    """Folder of results.json and report.html."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    batch_size: int = 256
    """Images or texts a forward pass."""
    workers: int = 2
    """Decoding threads."""


def main(words: Sequence[str]) -> int:
    """Evaluates; exit code 1 when a part could not be evaluated, with what there is written."""
    arguments = parse(EvalArguments, words, "cloob eval")
    if not arguments.models:
        raise InputError("no model given: name a run folder, or NAME/TAG of open_clip (cloob eval --help)")
    if not arguments.zeroshot and not arguments.retrieval:
        raise InputError("nothing to evaluate on: give --zeroshot DIR … or --retrieval SOURCE …")

    from cloob.commands.judge import check_writable, judge
    from cloob.data.labelled import open_labelled
    from cloob.data.sources import open_source
    from cloob.train.build import resolve_device

    check_writable(arguments.out)
    results = judge(
        _named(arguments.models),
        [open_labelled(path) for path in arguments.zeroshot],
        [open_source(path) for path in arguments.retrieval],
        arguments.out,
        device=str(resolve_device(arguments.device)),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        title="Evaluation",
    )
    print(f"{arguments.out / 'results.json'}\n{arguments.out / 'report.html'}")
    for failure in results.get("failures", ()):
        print(f"cloob: {failure['model']} on {failure['set']}: {failure['error']}", file=sys.stderr)
    return 1 if results.get("failures") else 0


def _named(sources: Sequence[str]) -> dict[str, str]:
    """The models by the last part of where they are, or by the whole where that would be two names alike."""
    short = [Path(source).name or source for source in sources]
    return {source if short.count(name) > 1 else name: source for source, name in zip(sources, short, strict=True)}
