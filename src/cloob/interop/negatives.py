"""The objective with hard negatives: candidates that are nobody's positive.

Anchors x, positives y, further candidates z; R(q | M) is the retrieval of q from the
memory M, or q itself without:

- the anchors R(x | x) against the candidates R(y | x) and R(z | x): the memory holds
  the N anchors;
- the positives R(y | y) against the candidates R(x | y): the memory holds the N
  positives.

Hard negatives are candidates of every anchor, and stored in no memory: there a hard
negative would be averaged with the positive that it resembles, and the difference that
it is there to teach would be lost.
"""

from __future__ import annotations

from torch import Tensor

from cloob import distributed
from cloob.distributed import Layout
from cloob.functional.checks import one_of
from cloob.objective import ContrastiveObjective, check_finite
from cloob.objective.batch import Batch
from cloob.objective.labels import Labels
from cloob.objective.loss import loss_of
from cloob.objective.values import Scales


def contrast_with_negatives(
    objective: ContrastiveObjective,
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
) -> Tensor:
    """The 0-d loss of (N, D) anchors and positives, unit rows, with (M, D) further
    candidates for the anchors.

    Every member of the family goes but the sigmoid loss, which has no softmax that the
    candidates could join. ValueError for shapes that do not fit, N < 2 without gather,
    and rows that are not finite or zero.
    """
    if objective.training:
        objective.clamp_()
    x, y, z = anchors, positives, negatives
    fault: Exception | None = None
    try:
        if x.shape != y.shape or z.shape[1:] != x.shape[1:] or len(x) < 1:
            raise ValueError(
                f"anchors {tuple(x.shape)}, positives {tuple(y.shape)}, negatives"
                f" {tuple(z.shape)}"
            )
        if objective.check:
            check_finite(anchors=x, positives=y, negatives=z)
    except Exception as error:
        if not objective.gather:
            raise
        fault = error  # raised on all ranks
    pairs, extra = Layout((len(x),)), Layout((len(z),))
    if objective.gather:
        ranks = distributed.agree(
            {"pairs": len(x), "negatives": len(z)}, fault, x.device
        )
        pairs, extra = Layout(ranks["pairs"]), Layout(ranks["negatives"])
    one_of("contrast", objective.contrast, ("infoloob", "infonce"))
    scales: Scales = {"inv_tau": objective.inv_tau, "beta": objective.beta, "bias": 0.0}
    batch = Batch(x, y, Labels(), scales, objective.member(), pairs)
    return loss_of(batch, objective.backend, objective.matmul, negatives=(z, extra))
