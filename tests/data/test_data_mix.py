from __future__ import annotations

import pickle
from pathlib import Path

from cloob.data.open import open_source
from cloob.data.source import mix


def test_sources_are_read_one_after_the_other(shards: Path) -> None:
    two = open_source(shards), open_source(shards / "00002.tar")  # of 5 + 4 + 3 and of 3 pairs
    both = mix(two)
    assert len(both) == 15 and both.shard_sizes == (5, 4, 3, 3) and not both.streamed
    expected = [two[0].read(i) for i in range(12)] + [two[1].read(i) for i in range(3)]
    assert [both.read(i) for i in range(15)] == expected
    assert both.name == f"{two[0].name} + {two[1].name}"
    assert pickle.loads(pickle.dumps(both)).read(14) == expected[14]
    assert mix(two[:1]) is two[0]
