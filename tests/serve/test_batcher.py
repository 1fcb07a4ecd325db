"""The batcher: equal to asking one by one, in as few calls as arrive together."""

from __future__ import annotations

import asyncio
import threading

import pytest
from anyio import CapacityLimiter
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from cloob.serve.batcher import Batcher


def run(queries: list[int], max_batch: int, fail: int | None = None) -> tuple[list[object], list[int]]:
    """All queries at once; their answers (or errors), and the sizes of the batches."""
    sizes: list[int] = []

    def work(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if fail in batch:
            raise ValueError("one is bad")
        return [query * query for query in batch]

    async def ask() -> list[object]:
        batcher = Batcher(work, CapacityLimiter(1), max_batch=max_batch)
        return await asyncio.gather(*(batcher(query) for query in queries), return_exceptions=True)

    return asyncio.run(ask()), sizes


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(-50, 50), max_size=40), st.integers(1, 9))
def test_each_gets_its_own_answer_in_few_calls(queries: list[int], max_batch: int) -> None:
    answers, sizes = run(queries, max_batch)
    assert answers == [query * query for query in queries]
    assert sum(sizes) == len(queries)
    assert len(sizes) == -(-len(queries) // max_batch)


def test_a_bad_query_fails_alone() -> None:
    answers, sizes = run([1, 2, 3, 4], 4, fail=3)
    assert [answers[i] for i in (0, 1, 3)] == [1, 4, 16]
    assert isinstance(answers[2], ValueError)
    assert sizes == [4, 1, 1, 1, 1]


def test_a_full_queue_says_so_and_who_has_left_is_not_worked_on() -> None:
    started, go_on, seen = threading.Event(), threading.Event(), []

    def work(batch: list[int]) -> list[int]:
        seen.extend(batch)
        started.set()
        assert go_on.wait(20)
        return batch

    async def ask() -> None:
        batcher = Batcher(work, CapacityLimiter(1), max_batch=1, max_waiting=2)
        first = asyncio.create_task(batcher(0))
        await asyncio.to_thread(started.wait, 20)
        waiting = [asyncio.create_task(batcher(query)) for query in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPException, match="503"):
            await batcher(3)
        waiting[0].cancel()
        go_on.set()
        assert await first == 0 and await waiting[1] == 2

    asyncio.run(ask())
    assert seen == [0, 2]
