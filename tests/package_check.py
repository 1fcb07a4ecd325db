"""Builds wheel and sdist and looks at them: ``python tests/package_check.py DIST
ENVIRONMENT [--whole]``.

Both go to DIST, the wheel built from the sdist. What is checked: ``twine check``, what
they hold, their size, and that the wheel runs in ENVIRONMENT, made anew: there torch
and what it requires are links to the packages of this Python. With ``--whole`` the
wheel is installed with its extras from the index instead, and ``cloob demo`` runs.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from torch_alone import link, required

ROOT = Path(__file__).parents[1]
LIMIT = 25 * 2**20  # bytes
FIRST_OF_PAGE = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# What each has to hold, and what may not get into either.
IN_WHEEL = ("cloob/py.typed", "cloob/objective/__init__.py", "cloob/data/demo/NOTICE")
IN_WHEEL += ("cloob/evaluation/sets/prompts/NOTICE.md",)
IN_SDIST = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    "src/cloob/py.typed",
)
IN_SDIST += (
    "tests/conftest.py",
    "docs/index.md",
    "docs/conf.py",
    "Makefile",
    "CONTRIBUTING.md",
    "SECURITY.md",
)
NOT_WANTED = re.compile(
    r"__pycache__|\.pyc$|(^|/)(\.venv|runs|dist|\.git|\.hypothesis|docs/api)(/|$)|^build/|\.env$"
    r"|records\.jsonl\.gz$|^benchmarks/results/.*\.json"
)


def build(dist):
    """The wheel and the sdist, built anew."""
    shutil.rmtree(dist, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], quiet=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
    return wheel, sdist


def faults(wheel, sdist):
    """What is wrong with the two files, a line each."""
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = archive.namelist()
        metadata = next(
            archive.read(name).decode()
            for name in in_wheel
            if name.endswith("METADATA")
        )
    with tarfile.open(sdist) as tar:
        in_sdist = [name.partition("/")[2] for name in tar.getnames()]
    found = [
        f"{path.name}: {path.stat().st_size:,} bytes"
        for path in (wheel, sdist)
        if path.stat().st_size >= LIMIT
    ]
    found += [
        f"{wheel.name} has no {name}" for name in IN_WHEEL if name not in in_wheel
    ]
    found += [
        f"{sdist.name} has no {name}" for name in IN_SDIST if name not in in_sdist
    ]
    found += [
        f"{name} is in it" for name in (*in_wheel, *in_sdist) if NOT_WANTED.search(name)
    ]
    found += [
        f"{wheel.name}: {name} is no part of the package"
        for name in in_wheel
        if not name.startswith("cloob")
    ]
    relative = re.findall(r"\]\((?!https?:)[^)]+\)", metadata)
    found += [
        f"{wheel.name}: {link} leads nowhere on the page of its metadata"
        for link in relative
    ]
    modules = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*.py")
    }
    found += [f"{wheel.name} has no {name}" for name in sorted(modules - set(in_wheel))]
    return found


def try_out(wheel, environment, *, whole):
    """Installs the wheel into a fresh environment and runs it there, away from the
    checkout.
    """
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python"]
    if whole:
        run([*install, str(python), f"{wheel}[align]"])
    else:
        link(required(("torch",)), next(environment.glob("lib/python*/site-packages")))
        run([*install, str(python), "--no-deps", str(wheel)])
    page = (ROOT / "docs" / "own-loop.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        command = str(environment / "bin" / "cloob")
        version = run([command, "--version"], cwd=folder, quiet=True)
        expected = f"cloob {wheel.name.split('-')[1]}\n"
        assert version == expected, (version, wheel.name)
        run([command, "--help"], cwd=folder, quiet=True)
        run(
            [str(python), "-W", "ignore", "-c", FIRST_OF_PAGE.findall(page)[0]],
            cwd=folder,
        )
        if whole:
            run([command, "demo", "--out", "runs/demo"], cwd=folder)


def run(command, cwd=None, *, quiet=False):
    """Runs a command to its end and returns what it wrote, which is also shown unless
    ``quiet``.
    """
    done = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=None, check=False
    )
    if not quiet or done.returncode:
        print(done.stdout, end="")
    if done.returncode:
        sys.exit(f"{' '.join(command[:6])} …: exit code {done.returncode}")
    return done.stdout


def main():
    dist = Path(sys.argv[1]).resolve()
    environment = Path(sys.argv[2]).resolve()
    wheel, sdist = build(dist)
    if found := faults(wheel, sdist):
        sys.exit("\n".join(found))
    try_out(wheel, environment, whole="--whole" in sys.argv[3:])
    print(
        *(
            f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB"
            for path in (wheel, sdist)
        ),
        sep="\n",
    )


if __name__ == "__main__":
    main()
