"""The world of factors: when CLOOB is ahead of CLIP, and why. See ``docs/study.md``."""
