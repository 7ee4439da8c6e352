"""Prototypical network: tell classes by the mean of a few examples of each."""

import torch
from torch import nn

from .base import ObjectiveOutput, check_choice, in_float32
from .utterance import UtteranceObjective

DISTANCES = ("euclidean", "cosine")


def draw_episodes(
    labels: torch.Tensor, keys: torch.Tensor, num_views: int, n_way: int, k_shot: int, n_query: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which views are the support and which the queries of which episode.

    Classes are taken in the order of the clips' keys, n_way for an episode; the last episode is filled from the first
    classes again, and if there are fewer than n_way in all, one episode holds them; one alone is none. Within a class
    first views come before second ones, so that the support is of different clips where the class has several.

    Args:
        labels, keys: (N,) of the clips.
        num_views: V, views of each clip; view v of clip b is row b * V + v.
        n_way: classes of an episode; k_shot: support of each; n_query: queries of each, at most.

    Returns:
        support (E, W, k_shot), rows; queries (Q,), rows; episodes (Q,) and targets (Q,), the episode of each query and
        its class there. A class of fewer than k_shot + 1 views is left out.
    """
    members: dict[int, list[int]] = {}
    order, names = keys.argsort(stable=True).tolist(), labels.tolist()
    for view in range(num_views):
        for clip in order:
            members.setdefault(names[clip], []).append(clip * num_views + view)
    classes = [rows for rows in members.values() if len(rows) > k_shot]
    ways = min(n_way, len(classes)) if len(classes) > 1 else 0
    num_episodes = -(-len(classes) // ways) if ways else 0
    places = [
        [classes[(episode * ways + way) % len(classes)] for way in range(ways)] for episode in range(num_episodes)
    ]
    support = [[rows[:k_shot] for rows in episode] for episode in places]
    queries = [
        (row, episode, way)
        for episode, chosen in enumerate(places)
        for way, rows in enumerate(chosen)
        for row in rows[k_shot : k_shot + n_query]
    ]
    columns = torch.tensor(queries, dtype=torch.long, device=labels.device).view(-1, 3).T
    return (torch.tensor(support, dtype=torch.long, device=labels.device).view(-1, max(ways, 1), k_shot), *columns)


@in_float32
def prototype_logits(queries: torch.Tensor, prototypes: torch.Tensor, distance: str, temperature: float = 1.0):
    """Class scores (Q, W) of queries (Q, D) by their nearness to the prototypes (Q, W, D) of their episodes.

    Minus the squared Euclidean distance, or the cosine; over temperature. Source: Snell et al. 2017, eq. 2.
    """
    if distance == "cosine":
        return nn.functional.cosine_similarity(queries[:, None], prototypes, dim=-1) / temperature
    return -(queries[:, None] - prototypes).square().sum(-1) / temperature


class Prototypical(UtteranceObjective):
    """In episodes of a few classes, tell the class of a query by its distance to the mean of each class's support.

    Learns an embedding in which a new class is described by a few examples: speakers, keywords or languages that were
    never trained on (`hf_speechcl.evaluation.few_shot.PrototypicalClassifier`). Classes are those of the label column
    if there is one, else crops of one utterance.

    Args:
        config: the encoder's configuration.
        n_way: classes in an episode; more make it harder (Snell et al. train with 20 to 60 for 5-way tests).
        k_shot: support examples of a class.
        n_query: queries of a class, at most.
        num_views: views of each clip; 0 for k_shot + n_query, as many as a clip that is a class of its own needs. With
            a label column classes have several clips (--clips_per_label): 1 view of each is enough and cheapest.
        distance: "euclidean" (squared, as in the paper) or "cosine".
        temperature: that scores are divided by; 0.1 suits the cosine. It is 1 in the paper, whose embeddings have no
            batch norm; with it squared distances are near 256, and at 10 and below the encoder's frames became alike.
        pooling, proj_dim, proj_layers, batch_norm: from frames to an embedding, see `UtteranceObjective`.

    Source: Snell et al. 2017, "Prototypical networks for few-shot learning", arXiv 1703.05175, algorithm 1.
    """

    remedy = "lower learning_rate, raise prototypical.n_way; with distance=cosine take a temperature near 0.1."

    def __init__(
        self,
        config,
        n_way: int = 8,
        k_shot: int = 1,
        n_query: int = 1,
        num_views: int = 0,
        distance: str = "euclidean",
        temperature: float = 50.0,
        pooling: str = "statistics",
        proj_dim: int = 128,
        proj_layers: int = 2,
        batch_norm: bool = True,
    ):
        super().__init__(config, num_views or k_shot + n_query, pooling, proj_dim, proj_layers, batch_norm)
        check_choice("prototypical.distance", distance, DISTANCES)
        if n_way < 2:
            raise ValueError(f"prototypical.n_way must be at least 2, found {n_way}")
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.distance, self.temperature = distance, temperature
        self.views_per_class = k_shot + 1

    def contrast(self, embeddings, labels, keys):
        rows = embeddings.flatten(0, 1)
        support, queries, episodes, targets = draw_episodes(
            labels, keys, embeddings.shape[1], self.n_way, self.k_shot, self.n_query
        )
        prototypes = rows[support].mean(2)  # (E, W, K, D) -> (E, W, D)
        logits = prototype_logits(rows[queries], prototypes[episodes], self.distance, self.temperature)
        num_items = torch.tensor(len(queries), device=rows.device)
        return ObjectiveOutput(
            loss=nn.functional.cross_entropy(logits, targets, reduction="sum"),
            num_items=num_items,
            metrics={
                "accuracy": (logits.detach().argmax(-1) == targets).float().sum(),
                "chance": num_items / logits.shape[1],
            },
        )
