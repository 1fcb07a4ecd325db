"""Puts a built site among the versions that are published: ``python docs/publish.py
BUILT SITE VERSION``.

SITE is a folder that any web server serves as it is. In it each version has a folder of
its own (``dev``, ``0.1.0``). ``versions.json`` lists them, the newest release first,
for the list in the sidebar; ``index.html`` leads to the newest release, or to ``dev``
before there is one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

VERSION = re.compile(r"dev|\d+(\.\d+){1,2}((a|b|rc)\d+)?")


def publish(built: Path, site: Path, version: str) -> list[str]:
    """Takes a built site into ``site`` as a version, in place of what was there under
    its name.

    Args:
        built: The folder that ``make docs`` has written.
        site: The folder with all versions; made if it is not there.
        version: ``dev``, or a release as PEP 440 spells it.

    Returns:
        All versions, the newest release first and ``dev`` last.

    Raises:
        ValueError: Another version, or a folder without an ``index.html``.
    """
    if not VERSION.fullmatch(version):
        raise ValueError(
            f"version is {version!r}; dev or a release like 0.1.0 is expected"
        )
    if not (built / "index.html").is_file():
        raise ValueError(f"{built} holds no index.html; `make docs` builds the site")
    shutil.rmtree(site / version, ignore_errors=True)
    shutil.copytree(
        built, site / version, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo")
    )
    names = [
        each.name
        for each in site.iterdir()
        if each.is_dir() and VERSION.fullmatch(each.name)
    ]
    versions = sorted(names, key=_age, reverse=True)
    (site / "versions.json").write_text(json.dumps(versions) + "\n", encoding="utf-8")
    first = next(
        (each for each in versions if re.fullmatch(r"[\d.]+", each)), versions[0]
    )
    head = (
        '<meta charset="utf-8"><title>cloob</title><meta http-equiv="refresh"'
        f' content="0; url={first}/">'
    )
    (site / "index.html").write_text(
        f'<!doctype html>{head}<a href="{first}/">cloob {first}</a>\n', encoding="utf-8"
    )
    (
        site / ".nojekyll"
    ).touch()  # GitHub Pages would leave out folders that begin with an underscore
    return versions


def _age(version: str) -> tuple[list[int], str, int]:
    """Orders versions: dev before all releases, a pre-release before its release."""
    if version == "dev":
        return [], "", 0
    numbers, kind, count = re.fullmatch(
        r"([\d.]+?)(?:(a|b|rc)(\d+))?", version
    ).groups()  # type: ignore[union-attr]
    return (
        [int(number) for number in numbers.split(".")],
        kind or "release",
        int(count or 0),
    )


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python docs/publish.py BUILT SITE VERSION")
    try:
        print(*publish(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
    except ValueError as error:
        sys.exit(str(error))
