"""Span masks and negatives: pure functions of a length and a generator."""

import numpy as np


def span_mask(num_frames: int, mask_prob: float, span: int, rng: np.random.Generator) -> np.ndarray:
    """Which frames of a clip to mask: spans of equal length at random starts, which may overlap.

    Args:
        num_frames: frames of the clip, T.
        mask_prob: length of all spans together, p, as a share of the clip; overlaps make the masked share smaller,
            about 1 - (1 - p / span)^span: p for single frames, 1 - exp(-p) for long spans.
        span: frames in a span.

    Returns:
        (T,) bool. Two frames at least, so that each masked frame has another to be told from; none at all in a clip
        of fewer than three frames, where nothing would be left to predict from.

    Source: Baevski et al. 2020, arXiv 2006.11477, section 3.1; the fraction of a span is rounded at random.
    """
    mask = np.zeros(num_frames, dtype=bool)
    if num_frames < 3 or mask_prob <= 0:
        return mask
    span = max(1, min(span, num_frames - 1))
    num_spans = int(mask_prob * num_frames / span + rng.random())
    num_spans = min(max(num_spans, 1 if span > 1 else 2), num_frames - span + 1)
    starts = rng.choice(num_frames - span + 1, size=num_spans, replace=False)
    mask[(starts[:, None] + np.arange(span)).ravel()] = True
    if mask.all():
        mask[rng.integers(num_frames)] = False
    return mask


def draw_negatives(num_masked: int, num_negatives: int, rng: np.random.Generator) -> np.ndarray:
    """For each of a clip's frames that count, others of them, uniformly with replacement.

    Returns:
        (num_masked, num_negatives) positions among the masked frames, never the row's own unless it is the only one.
    """
    if num_masked < 2:
        return np.zeros((num_masked, num_negatives), dtype=np.int64)
    draws = rng.integers(num_masked - 1, size=(num_masked, num_negatives))
    return draws + (draws >= np.arange(num_masked)[:, None])
