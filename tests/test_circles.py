"""No modules import each other in a circle; imports inside functions and for types alone count too."""

from __future__ import annotations

import functools

import grimp


def circles(imports: dict[str, set[str]]) -> set[frozenset[str]]:
    """The strongly connected components of more than one module."""

    @functools.cache
    def reach(start: str) -> frozenset[str]:
        reached, waiting = set(), list(imports[start])
        while waiting:
            if (module := waiting.pop()) not in reached:
                reached.add(module)
                waiting += imports[module]
        return frozenset(reached)

    tied = {start: frozenset(other for other in reach(start) if start in reach(other)) for start in imports}
    return {component for component in tied.values() if len(component) > 1}


def test_circles_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == {frozenset({"b", "c"})}


def test_no_circle_in_the_package() -> None:
    graph = grimp.build_graph("cloob", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "cloob.commands.train" in graph.modules and imports["cloob.cli"]
    assert circles(imports) == set()
