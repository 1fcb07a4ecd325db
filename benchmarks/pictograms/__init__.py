"""The pictogram study: CLOOB against CLIP on real pairs that a laptop can train on.

See ``docs/study.md``.
"""
