"""Word and character error rates: with intervals, of two models on the same clips, by slices, and which words."""

from collections import Counter
from collections.abc import Iterable, Sequence

import datasets
import evaluate
import jiwer
import numpy as np

MIN_CLIPS_OF_INTERVAL = 5  # resampling fewer clips than these gives an interval that is much too narrow
MAX_DRAWS = 10**7  # numbers drawn at once, which bounds memory
DURATION_EDGES = [1.0, 2.0, 5.0, 10.0, 20.0]  # seconds
SNR_EDGES = [10.0, 20.0, 30.0, 40.0, 50.0]  # dB


def edit_counts(references: list[str], hypotheses: list[str], characters: bool = False) -> np.ndarray:
    """Errors and reference length of every utterance, in words or in characters.

    Returns:
        (N, 2) int: substitutions + deletions + insertions, and words (or characters, spaces among them).
    """
    process = jiwer.process_characters if characters else jiwer.process_words
    outputs = [process(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses)]
    errors = [output.substitutions + output.deletions + output.insertions for output in outputs]
    lengths = [output.hits + output.substitutions + output.deletions for output in outputs]
    return np.array([errors, lengths], dtype=np.int64).T.reshape(-1, 2)


def resample(counts: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Sums (num_resamples, C) of the rows of (N, C), drawn with replacement N at a time, as float64: products of
    integers are far slower."""
    rng, counts = np.random.default_rng(seed), counts.astype(np.float64)
    shares = np.full(len(counts), 1 / len(counts))
    block = max(1, MAX_DRAWS // len(counts))
    sizes = [min(block, num_resamples - start) for start in range(0, num_resamples, block)]
    return np.concatenate(
        [rng.multinomial(len(counts), shares, size=size).astype(np.float64) @ counts for size in sizes]
    )


def bootstrap_interval(counts: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the error rate, utterances resampled with replacement (Bisani and Ney 2004).

    Args:
        counts: (N, 2), as `edit_counts` gives them.
    """
    errors, lengths = resample(counts, num_resamples, seed).T
    low, high = np.percentile(errors / np.maximum(lengths, 1), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(counts: np.ndarray, others: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> dict:
    """The difference of two error rates on the same utterances, which are resampled for both alike.

    Args:
        counts, others: (N, 2) each, as `edit_counts` gives them, of the same utterances in the same order.

    Returns:
        `difference`, the first rate minus the second; `low` and `high`, its 95% percentile interval; `share_better`,
        the share of resamples in which the first rate is the lower one, equal rates counted half.

    Source: Bisani and Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation".
    """
    if counts.shape != others.shape or (counts[:, 1] != others[:, 1]).any():
        raise ValueError(f"the two models must be scored on the same references, found {counts.shape}, {others.shape}")

    def differences(sums: np.ndarray) -> np.ndarray:
        return (sums[:, 0] - sums[:, 2]) / np.maximum(sums[:, 1], 1)

    both = np.concatenate([counts, others], axis=1)
    resampled = differences(resample(both, num_resamples, seed))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "difference": float(differences(both.sum(0, keepdims=True))[0]),
        "low": float(low),
        "high": float(high),
        "share_better": float((resampled < 0).mean() + (resampled == 0).mean() / 2),
    }


class SpeechErrorRates(evaluate.Metric):
    """WER and CER over all utterances together, with bootstrap 95% intervals; works offline.

    `compute(predictions=…, references=…)` gives `wer`, `wer_low`, `wer_high`, `cer`, `cer_low`, `cer_high` as shares
    (0.25, not 25). Texts are compared as they are: normalise them before.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Word and character error rate with bootstrap intervals.",
            citation="",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, num_resamples=1000, seed=0):
        results = {}
        for name, characters in (("wer", False), ("cer", True)):
            counts = edit_counts(references, predictions, characters)
            errors, length = counts.sum(0)
            if length == 0:
                raise ValueError("all references are empty: there is nothing to score against")
            results[name] = float(errors / length)
            results[f"{name}_low"], results[f"{name}_high"] = bootstrap_interval(counts, num_resamples, seed)
        return results


def align(reference: str, hypothesis: str) -> list[tuple[str | None, str | None]]:
    """Words of a reference beside those of a hypothesis, by the fewest errors: None where the other has one more.

    A pair of different words is a substitution, (word, None) a deletion and (None, word) an insertion.
    """
    output = jiwer.process_words(reference, hypothesis)
    references, hypotheses = output.references[0], output.hypotheses[0]
    pairs: list[tuple[str | None, str | None]] = []
    for chunk in output.alignments[0]:
        left = references[chunk.ref_start_idx : chunk.ref_end_idx]
        right = hypotheses[chunk.hyp_start_idx : chunk.hyp_end_idx]
        if chunk.type == "delete":
            pairs += [(word, None) for word in left]
        elif chunk.type == "insert":
            pairs += [(None, word) for word in right]
        else:
            pairs += zip(left, right)
    return pairs


def frequent_errors(errors: Iterable[tuple[str | None, str | None]], most: int = 30) -> dict[str, list]:
    """The most frequent pairs of `align` that are errors.

    Returns:
        `{"substitutions": [[word, for, count], …], "deletions": [[word, count], …], "insertions": [[word, count], …]}`
        where the second word of a substitution is what was heard.
    """
    counters = {"substitutions": Counter(), "deletions": Counter(), "insertions": Counter()}
    for reference, hypothesis in errors:
        if hypothesis is None:
            counters["deletions"][(reference,)] += 1
        elif reference is None:
            counters["insertions"][(hypothesis,)] += 1
        else:
            counters["substitutions"][(reference, hypothesis)] += 1
    return {
        kind: [[*words, count] for words, count in sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:most]]
        for kind, counter in counters.items()
    }


def name_bins(values: Iterable[float | None], edges: list[float], unit: str) -> list[str | None]:
    """The bin of every number as a text, such as "2 to 5 s"; None stays None."""
    names = [f"under {edges[0]:g} {unit}"]
    names += [f"{low:g} to {high:g} {unit}" for low, high in zip(edges, edges[1:])]
    names += [f"{edges[-1]:g} {unit} and more"]
    return [None if value is None else names[np.searchsorted(edges, value, side="right")] for value in values]


def slice_rates(counts: np.ndarray, names: list[str | None]) -> list[dict]:
    """WER of the clips of each name.

    Args:
        counts: (N, 2), as `edit_counts` gives them.
        names: (N,) of the slice that every clip is in; clips of None are in a slice of that name.

    Returns:
        `{"name", "clips", "words", "wer", "wer_low", "wer_high"}` of each, most words first; no interval (None) where
        there are fewer than five clips.
    """
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(name, []).append(row)
    slices = []
    for name, rows in groups.items():
        errors, words = counts[rows].sum(0).tolist()
        interval = bootstrap_interval(counts[rows]) if len(rows) >= MIN_CLIPS_OF_INTERVAL else (None, None)
        slices.append(
            {"name": name, "clips": len(rows), "words": words, "wer": errors / max(words, 1)}
            | {"wer_low": interval[0], "wer_high": interval[1]}
        )
    return sorted(slices, key=lambda entry: -entry["words"])


def score_slices(transcripts: list[dict], columns: Sequence[str]) -> dict[str, list[dict]]:
    """WER by the given columns, by duration and by signal-to-noise ratio, see `slice_rates`."""
    counts = edit_counts([clip["reference"] for clip in transcripts], [clip["hypothesis"] for clip in transcripts])
    slices = {column: slice_rates(counts, [clip["columns"][column] for clip in transcripts]) for column in columns}
    for name, key, edges, unit in (
        ("duration", "duration", DURATION_EDGES, "s"),
        ("signal-to-noise ratio", "snr", SNR_EDGES, "dB"),
    ):
        bins = name_bins([clip[key] for clip in transcripts], edges, unit)
        order = name_bins([edges[0] - 1, *edges], edges, unit)
        slices[name] = sorted(slice_rates(counts, bins), key=lambda entry: order.index(entry["name"]))
    return slices
