"""Batches of clips: of similar duration, filled to a number of seconds; or of several clips of each of some labels."""

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class DurationBatchSampler(Sampler):
    """Batches whose padded duration, longest clip times number of clips, stays within a limit.

    Clips are put into buckets of similar duration once; each epoch shuffles every bucket, cuts it into batches and
    shuffles these. So the number of batches is the same in every epoch, which an exact resume rests on, and the order
    is a function of (seed, epoch) alone.

    Args:
        durations: (N,) seconds of every clip.
        max_seconds: limit of a batch, padding included. A clip that is longer makes a batch of its own.
        max_clips: limit of a batch in clips.
        seed: of the order.
        shuffle: whether to shuffle; without, the batches run from long clips to short ones.
        rank, world_size: every rank gets each world_size-th batch. In training the first batches are repeated to give
            all ranks the same number; in evaluation (no shuffling) nothing is repeated.
        tolerance: shortest clip of a bucket as a share of its longest, at most missing (0.06: clips of 9.4 to 10 s).
            Less makes less padding, and smaller buckets, whose clips meet again more often. A bucket holds one full
            batch at least.

    Yields:
        Lists of keys (epoch, index) for `SpeechDataset`.
    """

    def __init__(
        self,
        durations: np.ndarray,
        max_seconds: float,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        tolerance: float = 0.06,
        max_clips: int | None = None,
    ):
        if len(durations) == 0:
            raise ValueError("no clips to make batches of")
        if max_seconds <= 0:
            raise ValueError(f"max_seconds must be positive, found {max_seconds}")
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.epoch = 0
        self.drop_last = False
        self.buckets = self._make_buckets(
            np.asarray(durations, dtype=np.float64), max_seconds, tolerance, max_clips or len(durations)
        )
        self.num_batches = sum(-(-len(bucket) // capacity) for bucket, capacity in self.buckets)

    @staticmethod
    def _make_buckets(durations, max_seconds, tolerance, max_clips) -> list[tuple[np.ndarray, int]]:
        """(indices, clips per batch) of every bucket, from the longest clips down."""
        order = np.argsort(-durations, kind="stable")
        descending = durations[order]
        buckets, start = [], 0
        while start < len(order):
            longest = descending[start]
            capacity = max(1, min(int(max_seconds / longest), max_clips))
            similar = np.searchsorted(-descending, -longest * (1 - tolerance), side="right") - start
            size = max(similar // capacity, 1) * capacity
            buckets.append((order[start : start + size], capacity))
            start += size
        return buckets

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        if self.shuffle:
            return -(-self.num_batches // self.world_size)
        return len(range(self.rank, self.num_batches, self.world_size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = []
        for bucket, capacity in self.buckets:
            indices = rng.permutation(bucket) if self.shuffle else bucket
            batches += [indices[start : start + capacity] for start in range(0, len(indices), capacity)]
        order = rng.permutation(len(batches)) if self.shuffle else np.arange(len(batches))
        if self.shuffle:
            order = np.resize(order, len(self) * self.world_size)
        for position in order[self.rank :: self.world_size]:
            yield [(self.epoch, int(index)) for index in batches[position]]


class LabelBatchSampler(Sampler):
    """Batches of several clips of each of several labels, for objectives that compare clips by label.

    Every label is drawn equally often, however many clips it has; its clips are taken in turn, shuffled anew when all
    were used. An epoch has as many batches as hold the number of clips there are, the same in every epoch.

    Args:
        labels: (N,) of every clip.
        clips_per_batch: clips of a batch, at most; two labels at least must fit into it.
        clips_per_label: clips of each label, with repetition where a label has fewer.
        seed: of the order, which is a function of (seed, epoch).
        rank, world_size: every rank gets each world_size-th batch.

    Yields:
        Lists of keys (epoch, index) for `SpeechDataset`; (epoch, index, n) where a clip comes again in the epoch.

    Source: Hermans et al. 2017, arXiv 1703.07737, section 2 (batches of P classes with K examples).
    """

    def __init__(
        self,
        labels: np.ndarray,
        clips_per_batch: int,
        clips_per_label: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self.members = np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1])
        if len(self.members) < 2:
            raise ValueError("all clips have the same label: there is nothing to compare them by")
        if clips_per_batch < 2 * clips_per_label:
            raise ValueError(
                f"a batch has room for {clips_per_batch} clips, and two labels with clips_per_label={clips_per_label} "
                f"need {2 * clips_per_label}: raise max_seconds_per_batch, and max_clips_per_batch where it is given, "
                "or lower clips_per_label or, where all objectives compare clips, view_seconds"
            )
        self.labels_per_batch = min(clips_per_batch // clips_per_label, len(self.members))
        self.clips_per_label, self.seed, self.rank, self.world_size = clips_per_label, seed, rank, world_size
        self.epoch = 0
        self.drop_last = False
        self.num_batches = -(-len(labels) // (self.labels_per_batch * clips_per_label * world_size))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        clips = [_forever(members, rng.spawn(1)[0]) for members in self.members]
        queue: deque[int] = deque()
        waiting: Counter[int] = Counter()
        drawn: Counter[int] = Counter()
        for batch in range(self.num_batches * self.world_size):
            if len(waiting) < self.labels_per_batch:
                labels = rng.permutation(len(clips)).tolist()
                queue.extend(labels)
                waiting.update(labels)
            chosen: dict[int, None] = {}
            again = []
            while len(chosen) < self.labels_per_batch:
                label = queue.popleft()
                if label in chosen:
                    again.append(label)
                chosen[label] = None
            queue.extendleft(reversed(again))
            for label in chosen:
                waiting[label] -= 1
                if not waiting[label]:
                    del waiting[label]
            keys = []
            for index in [int(next(clips[label])) for label in chosen for _ in range(self.clips_per_label)]:
                keys.append((self.epoch, index, drawn[index]) if drawn[index] else (self.epoch, index))
                drawn[index] += 1
            if batch % self.world_size == self.rank:
                yield keys


def _forever(members: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(members)
