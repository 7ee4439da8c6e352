"""ABX: whether a phone is nearer to another of its kind than to one of another kind."""

from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

FRAMES_AT_ONCE = 8192  # of the longest phones in a batch


@dataclass(frozen=True)
class Triples:
    """What is compared.

    Attributes:
        x, a, b: (K,) numbers of the tokens X and A, which are of one category, and B of another, all of one group.
        pairs: (K,) number of the pair of categories, whichever of the two X is of.
        weights: (K,) share of the triple in its pair's error.
    """

    x: np.ndarray
    a: np.ndarray
    b: np.ndarray
    pairs: np.ndarray
    weights: np.ndarray


def draw_triples(
    categories: list[str], groups: list[Hashable], min_tokens: int = 5, max_triples: int = 20000, seed: int = 0
) -> Triples:
    """Triples of tokens in which every contrast counts the same.

    A cell is a group with an ordered pair of categories: two tokens of the one, X and A, and one of the other, B. Cells
    have the same number of triples, drawn without replacement, or all they have where these are fewer; a pair's error
    is the mean over its groups, then over its two directions.

    Args:
        categories: (N,) of the tokens.
        groups: (N,) what the tokens of a triple have in common: the speaker, or the speaker and the neighbours.
        min_tokens: categories of fewer tokens are left out.
        max_triples: about how many there are at most; with more cells than that, so many cells are drawn.
        seed: of all that is drawn.

    Raises:
        ValueError: there is no triple; says what there is.
    """
    counts = Counter(categories)
    kept = {category: number for number, category in enumerate(sorted(counts)) if counts[category] >= min_tokens}
    members = defaultdict(lambda: defaultdict(list))
    for token, (category, group) in enumerate(zip(categories, groups)):
        if category in kept:
            members[group][category].append(token)
    cells = [
        (kept[one], kept[other], np.array(tokens), np.array(others))
        for found in members.values()
        for one, tokens in found.items()
        for other, others in found.items()
        if one != other and len(tokens) > 1
    ]
    if not cells:
        raise ValueError(
            f"ABX needs two phones of which one is said twice, of one speaker and in one context, each at least "
            f"{min_tokens} times in all; found {len(kept)} phones that often: give more clips"
        )
    rng = np.random.default_rng(seed)
    if len(cells) > max_triples:
        cells = [cells[number] for number in rng.choice(len(cells), max_triples, replace=False)]
    quota, per_direction = max_triples // len(cells), Counter(cell[:2] for cell in cells)
    parts = []
    for one, other, tokens, others in cells:
        possible = len(tokens) * (len(tokens) - 1) * len(others)
        drawn = np.arange(possible) if possible <= quota else rng.choice(possible, quota, replace=False)
        rest, b = np.divmod(drawn, len(others))
        x, a = np.divmod(rest, len(tokens) - 1)
        a += a >= x  # any but X
        directions = 1 + ((other, one) in per_direction)
        weight = 1 / (len(drawn) * per_direction[one, other] * directions)
        pair = min(one, other) * len(counts) + max(one, other)
        parts.append((tokens[x], tokens[a], others[b], np.full(len(drawn), pair), np.full(len(drawn), weight)))
    x, a, b, pairs, weights = map(np.concatenate, zip(*parts))
    return Triples(x, a, b, np.unique(pairs, return_inverse=True)[1], weights)


def abx_error(frames: np.ndarray, starts: np.ndarray, counts: np.ndarray, triples: Triples) -> dict[str, float]:
    """How often X is further from A than from B, ties half.

    The distance of two tokens is the mean angle between their frames along the cheapest path of dynamic time warping.

    Args:
        frames: (F, D) of all tokens.
        starts, counts: (N,) first frame and number of frames of each token.

    Returns:
        `abx_error`, the mean over pairs of categories: 0.5 by chance; `abx_interval`, half of its 95% interval, 1.96
        standard errors over these pairs; `abx_pairs` and `abx_triples`, how many there were.

    Source: Schatz et al. 2013, "Evaluating speech features with the Minimal-Pair ABX task", Interspeech; distance and
    averages as in Libri-Light, Kahn et al. 2019, arXiv 1912.07875, section 3.1. There the tokens are triphones that
    differ in their middle phone; here, unless groups hold the neighbours, single phones in any context.
    """
    norms = np.linalg.norm(frames, axis=1, keepdims=True)
    frames = frames / np.maximum(norms, np.finfo(frames.dtype).tiny)
    sides = np.concatenate([triples.a, triples.b]), np.concatenate([triples.x, triples.x])
    asked, places = np.unique(np.stack(sides), axis=1, return_inverse=True)
    to_a, to_b = dtw_distances(frames, starts, counts, *asked)[places.reshape(2, -1)]
    wrong = (to_a > to_b) + 0.5 * (to_a == to_b)
    errors = np.bincount(triples.pairs, triples.weights * wrong)
    spread = errors.std(ddof=1) / np.sqrt(len(errors)) if len(errors) > 1 else np.nan
    return {
        "abx_error": float(errors.mean()),
        "abx_interval": float(1.96 * spread),
        "abx_pairs": len(errors),
        "abx_triples": len(wrong),
    }


def dtw_distances(
    frames: np.ndarray, starts: np.ndarray, counts: np.ndarray, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """Mean angle, 0 to 1 for 0 to 180°, along the cheapest path between tokens `first` (P,) and `second` (P,).

    Args:
        frames: (F, D) unit vectors.
        starts, counts: (N,) of the tokens.
    """
    distances = np.empty(len(first))
    longest = np.maximum(counts[first], counts[second])
    order = np.argsort(-longest, kind="stable")
    while len(order):
        size = max(1, FRAMES_AT_ONCE // longest[order[0]])
        rows, order = order[:size], order[size:]
        n, m = counts[first[rows]], counts[second[rows]]
        one = frames[_padded(starts[first[rows]], n)]  # (P, N, D)
        other = frames[_padded(starts[second[rows]], m)]  # (P, M, D)
        cosines = one @ other.transpose(0, 2, 1)
        angles = np.arccos(np.clip(cosines, -1, 1)) / np.pi
        distances[rows] = _mean_along_path(angles.transpose(1, 2, 0), n, m)
    return distances


def _padded(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Frames (P, N) of tokens, the last repeated in those shorter than the longest."""
    return starts[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1)


def _mean_along_path(angles: np.ndarray, n: np.ndarray, m: np.ndarray) -> np.ndarray:
    """(N, M, P) angles of frames, of which n (P,) and m (P,) are of the tokens → (P,)."""
    shape = (angles.shape[0] + 1, angles.shape[1] + 1, angles.shape[2])
    costs, lengths = np.full(shape, np.inf), np.zeros(shape)
    costs[0, 0] = 0
    rows, columns = angles.shape[:2]
    for diagonal in range(rows + columns - 1):
        i = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        j = diagonal - i
        # Of the three cells before (i + 1, j + 1), the cheapest; of equal ones that which goes on in both tokens.
        both, left, up = costs[i, j], costs[i + 1, j], costs[i, j + 1]
        cheapest = np.minimum(np.minimum(both, left), up)
        costs[i + 1, j + 1] = cheapest + angles[i, j]
        longer = np.where(left <= up, lengths[i + 1, j], lengths[i, j + 1])
        lengths[i + 1, j + 1] = np.where(both == cheapest, lengths[i, j], longer) + 1
    tokens = np.arange(len(n))
    return costs[n, m, tokens] / lengths[n, m, tokens]
