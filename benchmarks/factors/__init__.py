"""The world of factors: when CLOOB is ahead of CLIP, and why. See ``docs/when-cloob-helps.md``."""
