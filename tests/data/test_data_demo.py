"""The set inside the package: what it must hold."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from cloob.data.batch import caption_id
from cloob.data.open import DEMO, open_source
from cloob.evaluation.sets.labelled import open_labelled
from cloob.pictures import decode

PERMISSIVE = {"public domain", "MIT", "Apache-2.0"}


def test_sizes() -> None:
    train, val, noto = open_source("demo"), open_source("demo:val"), open_labelled("demo:noto-emoji")
    assert 5_500 <= len(train) <= 6_500 and len(train.shard_sizes) > 1
    assert len(val) == 500 and len(noto) == 1540
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 10_000_000


@pytest.mark.parametrize("spec", ["demo", "demo:val"])
def test_every_pair_is_good(spec: str) -> None:
    source = open_source(spec)
    samples = [source.read(i) for i in range(len(source))]
    assert len({sample.key for sample in samples}) == len(samples)
    for sample in samples[::10]:
        assert decode(sample.image).size == (64, 64) and sample.image[8:12] == b"WEBP"


def test_held_out_captions_are_unique_and_not_trained_on() -> None:
    train, val = open_source("demo"), open_source("demo:val")
    trained = {caption_id(train.read(i).caption) for i in range(len(train))}
    held_out = [caption_id(val.read(i).caption) for i in range(len(val))]
    assert len(set(held_out)) == 500 and not trained & set(held_out)


def test_the_notice_counts_what_is_there() -> None:
    text = (DEMO / "NOTICE").read_text(encoding="utf-8")
    table = {
        m[1]: (m[2], int(m[3]), int(m[4]))
        for m in re.finditer(r"^(\S+) +(public domain|MIT|Apache-2\.0|\S+) +(\d+) +(\d+)  \S", text, re.MULTILINE)
    }
    for spec, column in (("demo", 1), ("demo:val", 2)):
        source = open_source(spec)
        keys = [source.read(i).key for i in range(len(source))]
        found = Counter(key.rpartition("/")[2].rpartition("-")[0] for key in keys)
        assert found == Counter({name: row[column] for name, row in table.items()})
    assert {row[0] for row in table.values()} == PERMISSIVE
    source = open_source("demo")
    counts = Counter(caption_id(source.read(i).caption) for i in range(len(source)))
    shared = sum(n for n in counts.values() if n > 1)
    assert f"{shared:,} of the {len(source):,} training pairs ({shared / len(source):.1%})" in text
    assert "Apache License" in (DEMO / "LICENSE-Apache-2.0").read_text()
