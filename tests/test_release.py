"""What a release is made of: one version, a citation, promises that are tested, workflows that call what exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import cloob

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_version_stands_in_one_place() -> None:
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/cloob/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?", cloob.__version__)
    assert "version" not in read_yaml(ROOT / "CITATION.cff")


def test_the_changelog_is_kept() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## \[(.+?)\]", text, flags=re.MULTILINE)
    assert titles[0] == "Unreleased"
    kinds = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_this_software_and_the_paper() -> None:
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["license"] == PROJECT["project"]["license"]
    assert all(citation[key] for key in ("title", "message", "authors", "type"))
    (paper,) = citation["references"]
    assert "2110.11316" in paper["url"] and len(paper["authors"]) == 11


def test_each_promise_of_security_has_tests_that_exist() -> None:
    promises = re.findall(r"^\| (.+?) \| (.+?) \|$", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.MULTILINE)
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, flags=re.MULTILINE))
    for promise, tests in promises[1:]:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, promise
        assert set(named) <= defined, set(named) - defined


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_what_exists(path: Path) -> None:
    workflow = read_yaml(path)
    assert workflow["permissions"] in ({}, {"contents": "read"}), "a job asks for more where it needs it"
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
    for script in re.findall(r"(?<!\S)((?:\.ci|docs)/\w+(?:\.py)?)\b", commands):
        assert (ROOT / script).exists(), script
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        assert "secrets." not in str(step)


def test_a_release_is_published_by_trust_and_first_for_a_try() -> None:
    jobs = read_yaml(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    assert [job for job, content in jobs.items() if content.get("permissions") == {"id-token": "write"}] == [
        "testpypi",
        "pypi",
    ]
    needs = {job: content.get("needs") for job, content in jobs.items()}
    assert needs == {"build": None, "testpypi": "build", "installs": "testpypi", "pypi": "installs"}


def test_issue_forms_are_forms() -> None:
    forms = [read_yaml(path) for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))]
    asking = [form for form in forms if "body" in form]
    assert len(asking) == 2
    for form in asking:
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        assert form["name"] and form["description"] and fields
        assert len({field["id"] for field in fields}) == len(fields)


def test_publishing_puts_versions_side_by_side(tmp_path: Path) -> None:
    """``docs/publish.py``: the newest release first, dev last, and the first page leads to the newest release."""

    def publish(version: str, text: str) -> subprocess.CompletedProcess[str]:
        built = tmp_path / "built"
        (built / ".doctrees").mkdir(parents=True, exist_ok=True)
        (built / "index.html").write_text(text)
        command = [sys.executable, str(ROOT / "docs" / "publish.py"), str(built), str(tmp_path / "site"), version]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    site = tmp_path / "site"
    assert publish("dev", "early").stdout.split() == ["dev"]
    assert 'href="dev/"' in (site / "index.html").read_text()
    for version in ("0.9.0", "0.10.0rc1", "0.10.0", "dev"):
        last = publish(version, f"page of {version}")
    assert last.stdout.split() == ["0.10.0", "0.10.0rc1", "0.9.0", "dev"]
    assert ast.literal_eval((site / "versions.json").read_text()) == last.stdout.split()
    assert 'href="0.10.0/"' in (site / "index.html").read_text()
    assert (site / "dev" / "index.html").read_text() == "page of dev"
    assert not (site / "dev" / ".doctrees").exists()
    for wrong in ("../out", "1", "v1.0.0", "latest/x"):
        refused = publish(wrong, "")
        assert refused.returncode == 1 and "is expected" in refused.stderr
    assert not (tmp_path / "out").exists()
