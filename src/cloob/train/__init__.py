"""Configuration, optimisation, checkpoints and the loop; called, it is ``cloob.train.loop.train``."""

from cloob.packages import make_callable

make_callable(__name__, "cloob.train.loop")
