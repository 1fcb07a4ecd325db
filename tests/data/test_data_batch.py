from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from cloob.data.batch import MAX_CAPTION_BYTES, BadSample, Skip, caption_id, clean_caption


def test_caption_id_ignores_case_and_spacing_only() -> None:
    assert caption_id("A  red\n Flag ") == caption_id("a red flag") == caption_id("A RED FLAG")
    assert caption_id("STRASSE") == caption_id("straße")  # casefold, not lower
    assert caption_id("a red flag") != caption_id("a redflag")
    assert caption_id("") != caption_id("a")


def test_caption_id_is_63_bits_and_the_same_in_every_process() -> None:
    ids = [caption_id(str(i)) for i in range(1000)]
    assert len(set(ids)) == 1000 and all(0 <= i < 2**63 for i in ids)
    assert max(ids) >= 2**62  # the highest bit that int64 leaves is in use
    torch.tensor(ids, dtype=torch.int64)
    code = "from cloob.data.batch import caption_id; print(caption_id('a red flag'))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(there.stdout) == caption_id("a red flag")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (None, "missing caption"),
        (b"", "empty caption"),
        (b" \n\t ", "empty caption"),
        (b"caf\xe9", "caption not UTF-8"),
        (b"a" * (MAX_CAPTION_BYTES + 1), "caption too long"),
    ],
)
def test_bad_captions_say_why(raw: bytes | None, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        clean_caption(raw, "k", "row 3")
    assert caught.value.reason == reason
    assert caught.value.skip.key == "k" and "row 3" in caught.value.skip.detail


def test_good_captions_come_out_stripped() -> None:
    assert clean_caption("﻿ ein Würfel \n".encode(), "k") == "ein Würfel"
    assert clean_caption(b"a" * MAX_CAPTION_BYTES, "k") == "a" * MAX_CAPTION_BYTES


def test_bad_sample_survives_pickling() -> None:
    bad = pickle.loads(pickle.dumps(BadSample("missing image", "k", "d")))
    assert bad.skip == Skip("k", "missing image", "d") and str(bad) == "k: missing image (d)"
