"""Says what a person has still to do before a release: ``make release-check``.

The address of the repository is in one place, ``[project.urls]`` of pyproject.toml, as
``Repository``; the site's links to sources come from it.
"""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def left_to_do():
    """A sentence for each thing that only a person can do."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    if "Repository" not in project.get("urls", {}):
        yield "address: set Repository in [project.urls] of pyproject.toml"
    version = read("src/cloob/__init__.py").partition('__version__ = "')[2]
    version = version.partition('"')[0]
    if "dev" in version:
        yield f"version: __version__ in src/cloob/__init__.py is {version}"
    if "(not released yet)" in read("CHANGELOG.md"):
        yield "date: CHANGELOG.md says “not released yet” of the newest version"
    citation = read("CITATION.cff")
    if f'version: "{version}"' not in citation:
        yield f"citation: CITATION.cff names another version than {version}"
    if not any(line.startswith("doi:") for line in citation.splitlines()):
        yield "DOI: reserve one and write it into CITATION.cff (doi: …)"
    yield f"name: is {project['name']!r} yours on the index, with a trusted publisher?"
    yield "GPU: benchmarks/gpu.py, once, on one"


if __name__ == "__main__":
    print("left for a person:")
    for sentence in left_to_do():
        print(f"- {sentence}")
