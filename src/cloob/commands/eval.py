"""``cloob eval``: models side by side on labelled sets and pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cloob.commands.arguments import check_amounts, parse
from cloob.errors import InputError, require

if TYPE_CHECKING:
    import tyro

    from cloob.evaluate.sets.suites import SuiteSets
else:  # the annotations below are read when the words are parsed
    tyro = require("tyro", "train")


@dataclass(frozen=True)
class EvalArguments:
    """Zero-shot classification, linear probes, retrieval and geometry of one or several models, side by side."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL …")]
    """Run or checkpoint folders, open_clip NAME/TAG, hf-hub:… or local-dir:…"""
    zeroshot: tuple[str, ...] = ()
    """Labelled sets: CLIP_benchmark WebDataset folders, folders with one sub-folder a class, or demo:noto-emoji."""
    suite: tuple[str, ...] = ()
    """Many labelled sets: paper, pictograms or vtab+, each followed by its folder unless --root is given."""
    root: Path | None = None
    """Folder of the suites that have no folder of their own."""
    retrieval: tuple[str, ...] = ()
    """Pictures and captions: whatever `cloob train --data` reads, CLIP_benchmark's retrieval folders, or demo:val.
    Several captions of a picture are rows of one path, a list in JSON lines, or lines of a .txt."""
    image_column: str = "filepath"
    """Column of a table of --retrieval with the path of the picture."""
    caption_column: str = "title"
    """Column of a table of --retrieval with the caption."""
    probe: bool = False
    """Also fit a linear probe for each labelled set that has training images (train/ beside test/)."""
    shots: int | None = None
    """Training images a class of a probe; all when left out."""
    probe_seeds: tuple[int, ...] = (0,)
    """One probe a seed, which draws its shots and its validation images."""
    out: Path = Path("runs/eval")
    """Folder of results.json, report.html, clip_benchmark/ and per_class/."""
    cache: Path | None = None
    """Folder of embeddings for later runs; OUT/cache when left out."""
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
    if not arguments.zeroshot and not arguments.retrieval and not arguments.suite:
        raise InputError("nothing to evaluate on: give --zeroshot DIR …, --suite NAME DIR or --retrieval SOURCE …")
    if not arguments.probe and (arguments.shots is not None or arguments.probe_seeds != (0,)):
        raise InputError("--shots and --probe-seeds are those of a linear probe; add --probe")
    check_amounts(arguments.batch_size, arguments.workers)

    from cloob.commands.console import print_table, tell
    from cloob.commands.judge import Comparison, check_writable, measure, write_page
    from cloob.distributed import resolve_device
    from cloob.evaluate.embeddings import EmbedOptions
    from cloob.evaluate.files import write_set_files
    from cloob.evaluate.measures.probe import ProbeOptions
    from cloob.evaluate.sets.captioned import open_captioned

    sets = _open(arguments)
    columns = {"image_column": arguments.image_column, "caption_column": arguments.caption_column}
    pairs = [*sets.pairs, *(open_captioned(path, **columns) for path in arguments.retrieval)]
    for line in sets.missing.values():
        print(f"cloob: {line}", file=sys.stderr)
    if not sets.sets and not pairs:
        raise InputError(f"nothing to evaluate on: none of the {len(sets.missing)} sets can be used")
    if arguments.probe and not sets.training and not sets.training_failed:
        raise InputError("--probe: none of the sets has training images (a folder train/ beside test/)")
    check_writable(arguments.out)
    comparison = Comparison(
        models=named(arguments.models),
        zeroshot=sets.sets,
        retrieval=pairs,
        training=sets.training,
        probe=ProbeOptions(shots=arguments.shots, seeds=arguments.probe_seeds),
        missing=sets.missing,
    )
    options = EmbedOptions(
        device=resolve_device(arguments.device),
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        cache=arguments.cache or arguments.out / "cache",
    )
    embeddings, results = measure(comparison, options, arguments.out)
    write_set_files(arguments.out, results, embeddings, comparison.zeroshot)
    write_page(arguments.out / "report.html", comparison, embeddings, results, title="Evaluation")
    print_table(results)
    print(f"{arguments.out / 'results.json'}\n{arguments.out / 'report.html'}")
    return tell(results)


def _open(arguments: EvalArguments) -> SuiteSets:
    """The sets of all suites, then those that are named one by one; a mistake in the latter ends the command."""
    from cloob.evaluate.sets.labelled import open_labelled
    from cloob.evaluate.sets.suites import open_suites, training_split

    if arguments.root is not None and not arguments.suite:
        raise InputError(f"root is {str(arguments.root)!r}, but no suite is asked for; add --suite, or leave it out")
    found = open_suites(arguments.suite, arguments.root, probe=arguments.probe)
    for path in arguments.zeroshot:
        data = open_labelled(path)
        found.sets.append(data)
        train = training_split(path) if arguments.probe else None
        if train is not None:
            found.training[data.name] = train
    return found


def named(sources: Sequence[str]) -> dict[str, str]:
    """The models by the last parts of where they are: one, or as many as no other model's place ends in."""
    parts = {source: Path(source).parts or (source,) for source in sources}

    def name(source: str) -> str:
        others = [other for each, other in parts.items() if each != source]
        for n in range(1, len(parts[source]) + 1):
            tail = parts[source][-n:]
            if all(other[-n:] != tail for other in others):
                return Path(*tail).as_posix()
        return source  # one place, written in two ways

    return {name(source): source for source in sources}
