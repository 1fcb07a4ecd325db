"""Heads on two frozen encoders, trained on captions of which a part is wrong: CLOOB
against CLIP.
"""
