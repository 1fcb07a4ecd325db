"""Options that have another name since the last release, by command; the next release forgets them.

On the command line an old name is answered with the new one. In a ``config.json``, which an earlier run may have
written, it is read as the new one, and what has gone is passed over.
"""

RENAMED = {
    "train": {"weights": "data_weights", "features": "cache_dir"},
    "eval": {"cache": "cache_dir"},
    "analyze": {"cache": "cache_dir"},
}
RETIRED = {"align.features"}
