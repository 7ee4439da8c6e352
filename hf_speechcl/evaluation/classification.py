"""Accuracy and F1 of a classifier, with intervals."""

import numpy as np

from .asr import resample


def classification_rates(
    predictions: list[int], references: list[int], num_resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Accuracy and macro-averaged F1 with bootstrap 95% intervals, clips resampled with replacement.

    Args:
        predictions: class of every clip, -1 where there is none; it counts as wrong.
        references: class of every clip.

    Returns:
        `accuracy`, `macro_f1`, both with `_low` and `_high`; `majority`, the accuracy of always naming the references'
        most frequent class. F1 is averaged over the classes that are named or to be named at least once.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if len(references) == 0:
        raise ValueError("there is no clip to score")
    classes = np.unique(np.concatenate([predictions[predictions >= 0], references]))
    named, true = predictions[:, None] == classes, references[:, None] == classes  # (N, C)
    counts = np.concatenate([named & true, named, true], axis=1).astype(np.int64)  # (N, 3 * C)
    resampled = resample(counts, num_resamples, seed)
    rates = {}
    for name, rate in (("accuracy", _accuracy), ("macro_f1", _macro_f1)):
        rates[name] = float(rate(*np.split(counts.sum(0), 3)))
        low, high = np.percentile(rate(*np.split(resampled, 3, axis=-1)), [2.5, 97.5])
        rates[f"{name}_low"], rates[f"{name}_high"] = float(low), float(high)
    return rates | {"majority": float(true.mean(0).max())}


def _accuracy(hits: np.ndarray, named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(…, C) counts each → (…)."""
    return hits.sum(-1) / true.sum(-1)


def _macro_f1(hits: np.ndarray, named: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(…, C) counts each → (…)."""
    seen = named + true > 0
    f1 = 2 * hits / np.where(seen, named + true, 1)
    return (f1 * seen).sum(-1) / seen.sum(-1)
