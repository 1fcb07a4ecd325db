"""``cloob index``: a collection of pictures becomes an index, or an index is brought up to date."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from cloob.commands.arguments import check_amounts, check_out, parse
from cloob.commands.indexing import IndexArguments
from cloob.data.shards.paths import is_pattern
from cloob.data.shards.spec import is_remote, local_path
from cloob.errors import InputError
from cloob.models.names import check_source
from cloob.search.sqlite.file import FILE, connect, one_line


def main(words: Sequence[str]) -> int:
    """Indexes; exit code 1 when a source could not be read, with what there is written."""
    arguments = parse(IndexArguments, words, "cloob index")
    check_amounts(arguments.batch_size, arguments.workers)
    if arguments.max_megapixels is not None and not arguments.max_megapixels > 0:
        raise InputError(f"--max-megapixels is {arguments.max_megapixels:g}; more than 0 is wanted")
    if not arguments.out:
        raise InputError("--out is missing; it says where the index is to be (cloob index --help)")
    if arguments.model is not None:
        check_source(arguments.model)
    known = _known_sources(arguments)
    for source in arguments.sources:
        _check_there(source, known)
    if arguments.export is not None:
        check_out("--export", arguments.export, (".parquet",), {*arguments.sources, *known})
    arguments.cache.use()
    from cloob.commands.work.index import run  # torch: only for words that are right

    return run(arguments)


def _known_sources(arguments: IndexArguments) -> set[str]:
    """The sources of an index that is there; refuses what cannot become one."""
    if is_remote(arguments.out):
        return set()
    folder = Path(arguments.out)
    file = folder / FILE
    if file.exists():
        connection = connect(file, writable=False)
        with closing(connection), one_line(file):
            return {row[0] for row in connection.execute("SELECT DISTINCT source FROM cloob_items")}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; --out is the folder of the index")
    if folder.is_dir() and any(not entry.name.startswith(".tmp-") for entry in folder.iterdir()):
        raise InputError(f"{folder}: is a folder with other files in it; --out names a new one, or an index")
    if arguments.sources and arguments.model is None:
        raise InputError("--model is missing; a new index needs one, such as a run folder or RN50/openai")
    if not arguments.sources and not arguments.merge:
        raise InputError(f"{folder}: no index; name what is to be indexed: cloob index SRC --model M --out {folder}")
    return set()


def _check_there(source: str, known: set[str]) -> None:
    if is_remote(source) or source.partition(":")[0] == "demo":
        return
    path = Path(local_path(source))
    if not path.exists() and not is_pattern(str(path)) and str(path.absolute()) not in known:
        raise InputError(f"{source}: no such file or folder")
