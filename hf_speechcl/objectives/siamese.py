"""Siamese networks: the margin loss on pairs, and SimSiam, which needs no negatives."""

import torch
from torch import nn

from .base import ObjectiveOutput, check_choice, in_float32
from .utterance import UtteranceObjective, as_rows, distances


@in_float32
def pair_losses(
    embeddings: torch.Tensor, labels: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half the squared distance of pairs that belong together, half the squared shortfall from the margin of others.

    Args:
        embeddings: (N, D), compared at unit length.
        labels: (N,); equal for rows that belong together.
        margin: distance that pairs of different labels must have, m, between 0 and 2.

    Returns:
        losses, distances and whether they belong together, of all N (N - 1) / 2 pairs.

    Source: Hadsell et al. 2006, "Dimensionality reduction by learning an invariant mapping", eq. 4.
    """
    unit = nn.functional.normalize(embeddings, dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1, device=unit.device)
    same = labels[first] == labels[second]
    apart = distances(unit, unit)[first, second]
    losses = torch.where(same, apart, (margin - apart).clamp_min(0)).square() / 2
    return losses, apart.detach(), same


@in_float32
def simsiam_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """One minus the cosine of each view's prediction with the other view, averaged over both, summed over clips.

    Args:
        predictions, targets: (N, 2, D).

    Source: Chen and He 2020, arXiv 2011.10566, eq. 2; 1 is added, so that 0 is the least.
    """
    return (1 - nn.functional.cosine_similarity(predictions, targets.flip(1), dim=-1)).sum() / 2


class Siamese(UtteranceObjective):
    """Draw pairs of the same class together; push others apart up to a margin, or (SimSiam) do without others.

    Learns which clips belong together, by their labels if there is a label column (speaker, keyword, language) or as
    crops of one utterance: one vector per clip, for verification and retrieval.

    Args:
        config: the encoder's configuration.
        form: "contrastive" (Hadsell et al. 2006) or "simsiam" (Chen and He 2020; views only, labels are not used).
        margin: of the contrastive form, m, in distances between unit vectors, which are 0 to 2;
            1.4 lies between unit vectors at right angles.
        stop_gradient: of SimSiam, against a collapse to one vector; off only to see that.
        pooling, proj_dim, proj_layers, batch_norm: from frames to an embedding, see `UtteranceObjective`.

    Of the contrastive form, all pairs of the update count, and those of the same class as much as the others together:
    pairs of different classes are so many more. SimSiam needs batch_norm as well as the stop-gradient.

    Source: Hadsell et al. 2006; Chen and He 2020, arXiv 2011.10566.
    """

    remedy = "keep siamese.stop_gradient on, take a siamese.margin of 1 to 1.5, lower learning_rate."

    def __init__(
        self,
        config,
        form: str = "contrastive",
        margin: float = 1.4,
        stop_gradient: bool = True,
        pooling: str = "statistics",
        proj_dim: int = 128,
        proj_layers: int = 2,
        batch_norm: bool = True,
    ):
        super().__init__(config, 2, pooling, proj_dim, proj_layers, batch_norm)
        check_choice("siamese.form", form, ("contrastive", "simsiam"))
        self.form, self.margin, self.stop_gradient = form, margin, stop_gradient
        if form == "simsiam":
            self.views_per_class = 0
            self.predictor = nn.Sequential(
                nn.Linear(proj_dim, -(-proj_dim // 4), bias=not batch_norm),
                nn.BatchNorm1d(-(-proj_dim // 4)) if batch_norm else nn.Identity(),
                nn.ReLU(),
                nn.Linear(-(-proj_dim // 4), proj_dim),
            )

    def contrast(self, embeddings, labels, keys):
        if self.form == "simsiam":
            rows = embeddings.flatten(0, 1)
            predictions = (
                self.predictor(rows) if len(rows) else rows + sum(p.sum() for p in self.predictor.parameters())
            )
            targets = embeddings.detach() if self.stop_gradient else embeddings
            return ObjectiveOutput(
                loss=simsiam_loss(predictions.view_as(embeddings), targets),
                num_items=torch.tensor(len(embeddings), device=embeddings.device),
                metrics={},
            )
        losses, apart, same = pair_losses(*as_rows(embeddings, labels), self.margin)
        num_same = same.sum()
        share = num_same / (~same).sum().clamp_min(1)
        weights = torch.where(same, 1.0, share)
        correct = (apart < self.margin / 2) == same
        return ObjectiveOutput(
            loss=(weights * losses).sum(),
            num_items=2 * num_same,
            metrics={"accuracy": (weights * correct).sum(), "chance": num_same.float()},
        )
