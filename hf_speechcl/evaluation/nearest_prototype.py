"""The rule of prototypical networks: a class is the mean of its examples."""

import numpy as np
import torch

from ..objectives.base import check_choice
from ..objectives.prototypical import DISTANCES, prototype_logits

MIN_SCALE = 0.1  # of the mean deviation: a channel that hardly differs among a few examples is not blown up


class NearestPrototype:
    """A class is the mean of its examples' vectors; a vector is of the class whose mean is nearest.

    Args:
        distance: "euclidean" (squared) or "cosine".
        temperature: that the scores are divided by; it changes probabilities, not which class is nearest.
        standardize: first bring every channel to mean 0 and standard deviation 1 over all examples.

    Attributes:
        classes: labels, in the order in which they were first seen.
        tensors: `prototypes` (C, D), and the `center` (D,) and `scale` (D,) of the channels.

    Source: Snell et al. 2017, "Prototypical networks for few-shot learning", arXiv 1703.05175, eq. 1 and 2.
    """

    def __init__(self, distance: str, temperature: float, standardize: bool):
        check_choice("distance", distance, DISTANCES)
        self.distance, self.temperature, self.standardize = distance, temperature, standardize
        self.classes: list[str | int] = []
        self.tensors: dict[str, torch.Tensor] = {}

    def fit(self, vectors: torch.Tensor, labels: list[str | int]) -> "NearestPrototype":
        """Take the means of (N, D) by their N labels, forgetting those of before.

        Raises:
            ValueError: not one label for each vector, a label that is neither a text nor a whole number, or empty, or
                fewer than two classes.
        """
        labels = [label.item() if isinstance(label, np.generic) else label for label in labels]
        if len(labels) != len(vectors):
            raise ValueError(f"labels must be as many as clips, found {len(labels)} for {len(vectors)}")
        for number, label in enumerate(labels):
            if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
                raise ValueError(f"labels[{number}] must be a text or a whole number, found {label!r}")
        classes = list(dict.fromkeys(labels))
        if len(classes) < 2:
            raise ValueError(f"labels must be of two classes at least, found {classes}: give clips of another class")
        center, scale = torch.zeros_like(vectors[0]), torch.ones_like(vectors[0])
        if self.standardize:
            center, scale = vectors.mean(0), vectors.std(0, correction=0)
            scale = scale.clamp_min(MIN_SCALE * scale.mean()).clamp_min(1e-6)
        rows = torch.tensor([classes.index(label) for label in labels], device=vectors.device)
        sums = torch.zeros(len(classes), vectors.shape[1], device=vectors.device)
        means = sums.index_add(0, rows, (vectors - center) / scale) / rows.bincount()[:, None]
        self.classes, self.tensors = classes, {"prototypes": means, "center": center, "scale": scale}
        return self

    def logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """Scores (N, C) of (N, D), the highest for the nearest class."""
        if not self.classes:
            raise ValueError("no classes yet: call fit with a few labelled clips of each class first")
        prototypes, center, scale = (
            self.tensors[name].to(vectors.device) for name in ("prototypes", "center", "scale")
        )
        vectors = (vectors - center) / scale
        return prototype_logits(vectors, prototypes.expand(len(vectors), -1, -1), self.distance, self.temperature)
