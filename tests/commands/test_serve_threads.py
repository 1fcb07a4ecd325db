"""What `cloob serve` asks of the libraries' threads, before it imports them."""

from __future__ import annotations

import os

import pytest

from cloob.commands import serve

NAMES = ("OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def test_two_searches_share_the_cores_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    for processors, threads in ((1, "1"), (2, "1"), (16, "8")):
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda n=processors: n)
        serve._share_cores()
        assert [os.environ[name] for name in NAMES] == ["PASSIVE", threads, "7"]
