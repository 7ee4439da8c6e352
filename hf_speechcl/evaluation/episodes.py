"""How well embeddings tell new classes by a few examples: accuracy over many random episodes."""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from .nearest_prototype import NearestPrototype


@dataclass
class Episode:
    """Rows of the support and of the queries, with the classes of both."""

    support: np.ndarray
    queries: np.ndarray


class EpisodeSampler:
    """Draws episodes of `n_way` classes with `k_shot` examples and up to `n_query` others of each.

    Args:
        labels: (N,) class of every clip, None where it has none.
        n_way, k_shot, n_query: of an episode.
        min_clips: classes of fewer clips are left out; k_shot + 1 at least.
        groups: (N,) of every clip, such as its speaker or where it was recorded; a clip of None is left out. With them,
            all examples of a class are of one group, drawn anew for each episode, and its queries are of its other
            groups: what the clips of one group share is then no help. Groups of fewer than k_shot clips are left out,
            and then classes of one group.

    Attributes:
        members: `{class: rows of each of its groups}` of the classes that are left.

    Raises:
        ValueError: fewer than n_way classes are left.
    """

    def __init__(self, labels: list, n_way: int, k_shot: int, n_query: int, min_clips: int, groups: list | None = None):
        places: dict = defaultdict(lambda: defaultdict(list))
        for row, label in enumerate(labels):
            if label is not None and (groups is None or groups[row] is not None):
                places[label][None if groups is None else groups[row]].append(row)
        self.n_way, self.k_shot, self.n_query = n_way, k_shot, n_query
        self.members: dict = {}
        needed = max(min_clips, k_shot + 1)
        for label in sorted(places):
            parts = [np.array(rows) for rows in places[label].values() if len(rows) >= k_shot]
            enough = sum(map(len, parts)) >= needed
            if enough and (groups is None or len(parts) > 1):
                self.members[label] = parts
        if len(self.members) < n_way:
            counts = ", ".join(f"{label} {sum(map(len, parts.values()))}" for label, parts in sorted(places.items()))
            raise ValueError(
                f"{n_way} classes are needed, and {len(self.members)} have enough clips (at least {needed}"
                f"{'' if groups is None else f', in two groups of at least {k_shot}'}); clips there are: {counts}"
            )

    def draw(self, rng: np.random.Generator) -> dict[str, Episode]:
        """One episode, by class."""
        classes = sorted(rng.choice(list(self.members), self.n_way, replace=False).tolist())
        return {label: self._draw_class(self.members[label], rng) for label in classes}

    def _draw_class(self, groups: list[np.ndarray], rng: np.random.Generator) -> Episode:
        first = rng.permutation(groups[chosen := rng.integers(len(groups))])
        others = groups[:chosen] + groups[chosen + 1 :]
        rest = rng.permutation(np.concatenate(others)) if others else first[self.k_shot :]
        return Episode(first[: self.k_shot], rest[: self.n_query])


def score_episodes(
    vectors: torch.Tensor, rule: NearestPrototype, sampler: EpisodeSampler, num_episodes: int, seed: int
) -> dict:
    """Accuracy of a rule on the embeddings (N, D) of the sampler's clips; every class counts the same in an episode.

    Returns:
        `accuracy`, the mean over episodes; `interval`, half of its 95% interval, 1.96 standard errors over episodes;
        `class_sets`, how many sets of classes were drawn ten times or more, and the `lowest_set` and `highest_set` mean
        of one of them; `by_class`, the share of each class' queries that were found.
    """
    rng = np.random.default_rng(seed)
    accuracies, by_set, by_class = [], defaultdict(list), defaultdict(list)
    for _ in range(num_episodes):
        episode = sampler.draw(rng)
        support = np.concatenate([part.support for part in episode.values()])
        rule.fit(vectors[support], [label for label, part in episode.items() for _ in part.support])
        shares = []
        for label, part in episode.items():
            nearest = rule.logits(vectors[part.queries]).argmax(-1)
            shares.append(float((nearest == rule.classes.index(label)).float().mean()))
            by_class[label].append(shares[-1])
        accuracies.append(float(np.mean(shares)))
        by_set[tuple(episode)].append(accuracies[-1])
    sets = [float(np.mean(values)) for values in by_set.values() if len(values) >= 10]
    return {
        "accuracy": float(np.mean(accuracies)),
        "interval": 1.96 * float(np.std(accuracies, ddof=1)) / math.sqrt(num_episodes),
        "class_sets": len(sets),
        "lowest_set": min(sets, default=None),
        "highest_set": max(sets, default=None),
        "by_class": {label: float(np.mean(by_class[label])) for label in sorted(by_class)},
    }
