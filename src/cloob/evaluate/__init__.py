"""Embed once; zero-shot, probe, retrieval and geometry are small callables on the embeddings.

Called, the package is ``cloob.evaluate.suite.evaluate``.
"""

from cloob.packages import make_callable

make_callable(__name__, "cloob.evaluate.suite")
