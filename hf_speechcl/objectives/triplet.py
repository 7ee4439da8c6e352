"""Triplet network: an anchor nearer to its own class than to others, by a margin."""

import torch
from torch import nn

from .base import ObjectiveOutput, check_choice, in_float32
from .utterance import UtteranceObjective, as_rows, distances

MINING = ("batch_all", "batch_hard", "semi_hard")


@in_float32
def triplet_gaps(embeddings: torch.Tensor, labels: torch.Tensor, mining: str) -> torch.Tensor:
    """Distance to the positive less distance to the negative, of every triplet that the mining picks.

    Args:
        embeddings: (N, D), compared at unit length by squared distance.
        labels: (N,).
        mining: "batch_all": all triplets; "batch_hard": for each anchor the farthest positive and the nearest
            negative; "semi_hard": for each anchor and positive the nearest negative that is farther than the positive,
            or the farthest of all where none is.

    Returns:
        (K,) gaps; a row without a positive or a negative is no anchor.

    Source: Schroff et al. 2015, arXiv 1503.03832, section 3.2 (semi-hard); Hermans et al. 2017, arXiv 1703.07737,
    eq. 5 and 6 (batch hard, batch all).
    """
    unit = nn.functional.normalize(embeddings, dim=-1)
    squared = distances(unit, unit).square()
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    negative = ~same
    if mining == "batch_hard":
        anchors = positive.any(1) & negative.any(1)
        farthest = squared.masked_fill(~positive, -1)[anchors]
        nearest = squared.masked_fill(~negative, float("inf"))[anchors]
        return _max(farthest) - _min(nearest)
    anchor, other = (positive & negative.any(1)[:, None]).nonzero(as_tuple=True)
    to_positive = squared[anchor, other]
    if mining == "batch_all":
        gaps = to_positive[:, None] - squared[anchor]
        return gaps[negative[anchor]]
    farther = squared[anchor].masked_fill(~negative[anchor] | (squared[anchor] <= to_positive[:, None]), float("inf"))
    farthest = squared[anchor].masked_fill(~negative[anchor], -1)
    chosen = torch.where(farther.isfinite().any(1), _min(farther), _max(farthest))
    return to_positive - chosen


def _max(values: torch.Tensor) -> torch.Tensor:
    return values.max(1).values if values.numel() else values.sum(1)


def _min(values: torch.Tensor) -> torch.Tensor:
    return values.min(1).values if values.numel() else values.sum(1)


class Triplet(UtteranceObjective):
    """Bring an anchor nearer to a clip of its class than to one of another, by a margin.

    Learns distances between clips, for verification and retrieval (speaker, keyword, language). Classes are those of
    the label column if there is one, else the two views of each utterance.

    Args:
        config: the encoder's configuration.
        mining: which triplets of the update count: batch_all, batch_hard or semi_hard (see `triplet_gaps`).
        margin: in squared distances between unit vectors, which are 0 to 4 (0.2 in Schroff et al.).
        soft_margin: log(1 + exp(gap)) in place of max(0, margin + gap) (Hermans et al.).
        pooling, proj_dim, proj_layers, batch_norm: from frames to an embedding, see `UtteranceObjective`.

    `accuracy` is the share of all triplets in which the positive is nearer. With batch_all and a hard margin the loss
    is averaged over the triplets that do not yet keep the margin, as in Hermans et al.; otherwise over all that the
    mining picks.

    Source: Schroff et al. 2015, arXiv 1503.03832, eq. 3; Hermans et al. 2017, arXiv 1703.07737.
    """

    remedy = (
        "begin with triplet.mining=semi_hard or batch_all, since batch_hard pulls to one point; lower learning_rate."
    )

    def __init__(
        self,
        config,
        mining: str = "semi_hard",
        margin: float = 0.2,
        soft_margin: bool = False,
        pooling: str = "statistics",
        proj_dim: int = 128,
        proj_layers: int = 2,
        batch_norm: bool = True,
    ):
        super().__init__(config, 2, pooling, proj_dim, proj_layers, batch_norm)
        check_choice("triplet.mining", mining, MINING)
        self.mining, self.margin, self.soft_margin = mining, margin, soft_margin

    def contrast(self, embeddings, labels, keys):
        gaps = triplet_gaps(*as_rows(embeddings, labels), self.mining)
        losses = nn.functional.softplus(gaps) if self.soft_margin else (gaps + self.margin).clamp_min(0)
        active = losses.detach() > 0
        only_active = self.mining == "batch_all" and not self.soft_margin
        # Triplets that all keep the margin make a loss of 0, not of nothing.
        num_items = torch.tensor(len(gaps), device=gaps.device)
        if only_active:
            num_items = active.sum().clamp_min(1).minimum(num_items)
        share = num_items / max(len(gaps), 1)
        with torch.no_grad():
            all_gaps = gaps if self.mining == "batch_all" else triplet_gaps(*as_rows(embeddings, labels), "batch_all")
        return ObjectiveOutput(
            loss=losses.sum(),
            num_items=num_items,
            metrics={
                "accuracy": (all_gaps < 0).float().mean().nan_to_num() * num_items,
                "chance": 0.5 * num_items,
                "active_triplets": active.sum() * share,
            },
        )
