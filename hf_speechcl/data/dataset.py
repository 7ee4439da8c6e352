"""Corpus rows → decoded clips, for a DataLoader."""

import logging
from collections.abc import Iterable, Iterator

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .audio import AudioError, read_audio, to_int16
from .columns import column_of

logger = logging.getLogger(__name__)


class SpeechDataset(Dataset):
    """Clips of a corpus, decoded when asked for.

    Args:
        corpus: rows as `load_corpus` gives them.
        sampling_rate: of the model, in Hz.
        seed: of everything drawn for a clip.
        max_seconds: longer recordings are split into equal parts of at most this length; `None` leaves them whole.
        min_seconds: shorter clips are left out; how many is logged.
        in_16_bits: give samples as int16, rounded, which is what training wants; otherwise as float32.

    Attributes:
        durations: (N,) seconds of every clip.
        labels: (N,) class of every clip, by the corpus' column label; a clip without one is a class of its own.
        has_labels: whether the corpus has that column.

    `dataset[epoch, index]` is `{"index", "label", "seed": (seed, epoch, index), "input_values": (S,)}`. What is drawn
    for a clip depends on its seed alone, not on the batch it is in. A clip that cannot be decoded, or holds only zeros,
    is logged by name and comes with `input_values` None, for the collator to count and leave out.
    """

    decoded: dict[int, np.ndarray] | None = None
    bytes_left = 0

    def __init__(
        self,
        corpus: datasets.Dataset,
        sampling_rate: int,
        seed: int = 0,
        max_seconds: float | None = None,
        min_seconds: float = 0.1,
        in_16_bits: bool = True,
    ):
        self.corpus, self.sampling_rate, self.seed, self.in_16_bits = corpus, sampling_rate, seed, in_16_bits
        seconds = column_of(corpus, "duration").to_numpy()
        parts = np.ones(len(seconds), dtype=int) if max_seconds is None else np.ceil(seconds / max_seconds).astype(int)
        parts = np.where(seconds < min_seconds, 0, np.maximum(parts, 1))
        short = np.flatnonzero(parts == 0)
        if len(short):
            logger.warning(
                "%d of %d clips are shorter than %g s and left out: %s",
                len(short),
                len(parts),
                min_seconds,
                ", ".join(corpus.select(short[:20])["id"]) + (" …" if len(short) > 20 else ""),
            )
        if not parts.any():
            raise ValueError(f"no clip is left of {len(seconds)}: all are shorter than min_seconds={min_seconds}")
        self.rows = np.repeat(np.arange(len(seconds)), parts)
        self.durations = np.repeat(seconds / np.maximum(parts, 1), parts)
        number_in_row = np.arange(len(self.rows)) - np.repeat(np.cumsum(parts) - parts, parts)
        self.starts = self.durations * number_in_row
        self.whole = np.repeat(parts == 1, parts)
        self.labels = np.arange(len(self.rows))
        self.has_labels = "label" in corpus.column_names
        if self.has_labels:
            names = np.array(["" if name is None else name for name in column_of(corpus, "label").to_pylist()])[
                self.rows
            ]
            classes, labels = np.unique(names, return_inverse=True)
            self.labels = np.where(names == "", len(classes) + self.labels, labels)

    @property
    def hours(self) -> float:
        return float(self.durations.sum() / 3600)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        epoch, index, *repeat = key
        return {
            "index": index,
            "label": int(self.labels[index]),
            "seed": (self.seed, epoch, index, *repeat),
            "input_values": self._samples(index),
        }

    def keep_decoded(self, max_bytes: float) -> None:
        """From now on keep clips in memory, as they are decoded, until they take `max_bytes`; 115 MB hold an hour at
        16 kHz. Processes of a DataLoader each keep their own, for one epoch."""
        self.decoded, self.bytes_left = {}, max_bytes

    def _samples(self, index: int) -> np.ndarray | None:
        """A clip (S,), or None, with a line in the log, if it is of no use."""
        if self.decoded is not None and index in self.decoded:
            return self.decoded[index]
        row = self.corpus[int(self.rows[index])]
        duration = None if self.whole[index] else self.durations[index]
        try:
            samples = read_audio(row["audio"], self.sampling_rate, self.starts[index], duration)
            samples = to_int16(samples) if self.in_16_bits else samples
            if not samples.any():
                raise AudioError("digital silence")
        except AudioError as error:
            logger.warning("skipped %s: %s", row["id"], error)
            return None
        if self.decoded is not None and samples.nbytes <= self.bytes_left:
            samples.flags.writeable = False
            self.decoded[index] = samples
            self.bytes_left -= samples.nbytes
        return samples


def clip_ids(dataset: SpeechDataset) -> list[str]:
    """Ids of the rows, of a part of a row with the second at which it starts: `talk.wav@12.500`."""
    ids = dataset.corpus["id"][:]
    return [
        ids[row] if whole else f"{ids[row]}@{start:.3f}"
        for row, start, whole in zip(dataset.rows, dataset.starts, dataset.whole)
    ]


def decoded(dataset: SpeechDataset, indices: Iterable[int], num_workers: int = 0) -> Iterator[np.ndarray | None]:
    """Clips (S,) in this order, each once; None for one that could not be decoded."""
    keys = [(0, int(index)) for index in indices]
    options = {"num_workers": num_workers, "generator": torch.Generator(), "collate_fn": _samples_of}
    yield from DataLoader(dataset, batch_size=None, sampler=keys, **options)


def _samples_of(clip: dict) -> np.ndarray | None:
    return clip["input_values"]
