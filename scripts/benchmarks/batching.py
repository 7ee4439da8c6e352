#!/usr/bin/env python
"""Batches by duration against random ones: what is padding, how random the order stays, how long setting up takes.

python scripts/benchmarks/batching.py --corpora queen_en pool librispeech-like --max_seconds_per_batch 40 160

An epoch's padding is counted in frames of the encoder. "Together again" is the share of pairs of clips of one batch
that are in one batch of the next epoch too; "partners" is with how many different clips a clip shares a batch in 10
epochs, as a share of what there could be. "Within" and "between" are the standard deviation of durations within
batches (mean), and of the mean durations of batches, both as a share of that of all clips; "follows" is the correlation
of the mean duration of a batch with that of the one before it.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402

from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.data import DurationBatchSampler, SpeechDataset, load_corpus  # noqa: E402
from hf_speechcl.machine import describe_machine  # noqa: E402

LIBRISPEECH_CLIPS = 28_539  # of train-clean-100
EPOCHS = 10


@dataclass
class Arguments:
    corpora: list[str] = option(
        ["demo", "librispeech-like"], "Sources; librispeech-like is a made-up distribution, see `librispeech_like`."
    )
    split: str = option("train", "Their split.")
    max_seconds_per_batch: list[float] = option([40.0, 160.0], "Seconds of audio in a batch, padding included.")
    max_seconds: float = option(15.0, "Longer recordings are split into equal parts of at most this many seconds.")
    min_seconds: float = option(0.4, "Shorter clips are left out.")
    frame_rate: float = option(25.0, "Frames of the encoder per second.")
    tolerances: list[float] = option([], "Tolerances of the sampler to compare; its own if none are given.")
    rows: int = option(1_000_000, "Clips of the sampler whose setting up is timed.")

    def __post_init__(self):
        for name in ("max_seconds_per_batch", "tolerances"):
            if any(value <= 0 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if min(self.max_seconds, self.frame_rate, self.rows) <= 0:
            raise ValueError("max_seconds, frame_rate and rows must be positive")


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    print(describe_machine("numpy") + "\n")
    print(
        "| corpus | clips | hours | seconds a batch | batches | wasted frames | clips a batch | together again "
        f"| partners in {EPOCHS} epochs | within | between | follows |"
    )
    print("|" + "---|" * 12)
    for corpus in args.corpora:
        durations = read_durations(corpus, args)
        for seconds in args.max_seconds_per_batch:
            kinds = {"random": RandomBatches(durations, seconds)}
            if args.tolerances:
                for tolerance in args.tolerances:
                    sampler = DurationBatchSampler(durations, seconds, tolerance=tolerance)
                    kinds[f"by duration, tolerance {tolerance:g}"] = sampler
            else:
                kinds["by duration"] = DurationBatchSampler(durations, seconds)
            for kind, sampler in kinds.items():
                cells = [
                    Path(corpus).name,
                    f"{len(durations):,}",
                    f"{durations.sum() / 3600:.1f}",
                    f"{seconds:g}",
                    kind,
                ]
                print(f"| {' | '.join(cells + measure(durations, sampler, args.frame_rate))} |", flush=True)
    time_set_up(args)


class RandomBatches:
    """Clips in random order, a batch as long as the padded seconds allow."""

    def __init__(self, durations: np.ndarray, max_seconds: float):
        self.durations, self.max_seconds, self.epoch = durations, max_seconds, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        batch, longest = [], 0.0
        for index in np.random.default_rng([0, self.epoch]).permutation(len(self.durations)).tolist():
            longest = max(longest, self.durations[index])
            if batch and longest * (len(batch) + 1) > self.max_seconds:
                yield batch
                batch, longest = [], self.durations[index]
            batch.append((self.epoch, index))
        yield batch


def measure(durations: np.ndarray, sampler, frame_rate: float) -> list[str]:
    frames = np.ceil(durations * frame_rate - 1e-6)
    epochs = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        epochs.append([np.array([index for _, index in batch]) for batch in sampler])
    padded = np.array([sum(frames[batch].max() * len(batch) for batch in batches) for batches in epochs])
    wasted = 1 - frames.sum() / padded
    sizes = np.array([len(batch) for batch in epochs[0]])
    again = [share_together(first, second, len(durations)) for first, second in zip(epochs, epochs[1:])]
    means = np.array([durations[batch].mean() for batch in epochs[0]])
    within = np.average([durations[batch].std() for batch in epochs[0]], weights=sizes) / durations.std()
    follows = np.corrcoef(means[:-1], means[1:])[0, 1] if len(means) > 2 else np.nan
    return [
        f"{np.mean(wasted):.2%} ({wasted.min():.2%} to {wasted.max():.2%})",
        f"{sizes.mean():.1f}",
        f"{np.mean(again):.1%}",
        f"{share_of_partners(epochs, len(durations)):.0%}",
        f"{within:.2f}",
        f"{means.std() / durations.std():.2f}",
        f"{follows:+.2f}",
    ]


def share_together(first: list[np.ndarray], second: list[np.ndarray], num_clips: int) -> float:
    """The share of pairs of clips of a batch of the first epoch that are together in the second."""
    place = np.empty(num_clips, int)
    for number, batch in enumerate(second):
        place[batch] = number
    pairs = kept = 0
    for batch in first:
        _, counts = np.unique(place[batch], return_counts=True)
        pairs += len(batch) * (len(batch) - 1)
        kept += (counts * (counts - 1)).sum()
    return kept / max(pairs, 1)


def share_of_partners(epochs: list[list[np.ndarray]], num_clips: int) -> float:
    """Different partners of up to 500 clips over the epochs, of all that a new partner in every place would make."""
    places = []
    for batches in epochs:
        place = np.empty(num_clips, int)
        for number, batch in enumerate(batches):
            place[batch] = number
        places.append(place)
    found = possible = 0
    for clip in np.random.default_rng(0).permutation(num_clips)[:500]:
        partners = [batches[place[clip]] for batches, place in zip(epochs, places)]
        possible += min(sum(len(batch) - 1 for batch in partners), num_clips - 1)
        found += len(np.unique(np.concatenate(partners))) - 1
    return found / max(possible, 1)


def time_set_up(args: Arguments) -> None:
    durations = librispeech_like(args.rows)
    print(f"\n| seconds a batch | clips | set-up s | first batch of an epoch s |\n{'|---' * 4}|")
    for seconds in args.max_seconds_per_batch:
        began = time.perf_counter()
        sampler = DurationBatchSampler(durations, seconds)
        ready = time.perf_counter()
        next(iter(sampler))
        print(f"| {seconds:g} | {args.rows:,} | {ready - began:.2f} | {time.perf_counter() - ready:.2f} |")


def read_durations(corpus: str, args: Arguments) -> np.ndarray:
    if corpus != "librispeech-like":
        rows = load_corpus(corpus, args.split)
        return SpeechDataset(rows, 16000, max_seconds=args.max_seconds, min_seconds=args.min_seconds).durations
    seconds = librispeech_like(LIBRISPEECH_CLIPS)
    parts = np.ceil(seconds / args.max_seconds).astype(int)
    return np.repeat(seconds / parts, parts)


def librispeech_like(num_clips: int) -> np.ndarray:
    """Durations with a mode at 12 to 16 s, a long tail of shorter clips and a mean of 12.6 s, as LibriSpeech's
    train-clean-100 has by its description: 28,539 clips, 100.6 hours, 1.4 to 24.5 s. (Not its real durations.)"""
    rng = np.random.default_rng(0)
    common = np.clip(rng.normal(14.6, 1.0, num_clips), 1.5, 24.5)
    return np.where(rng.random(num_clips) < 0.68, common, 1.4 + 14.0 * rng.beta(1.6, 1.2, num_clips))


if __name__ == "__main__":
    main()
