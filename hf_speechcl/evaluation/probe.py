"""How much of the phones is in the frames of an encoder that was not trained on them: a linear probe and ABX."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..data.phones import PhoneClip, load_phone_clips
from .abx import abx_error, draw_triples

L2 = 5e-3  # between 3e-3 and 1e-2, the best for an untrained encoder and for log-mel, 5,000 frames of each
TOLERANCE = (
    1e-3  # of the loss's gradient; a tenth of it took thrice as long and changed accuracies by 0.4 points or less
)
SILENCES = ("pau", "sil", "SIL", "sp", "spn", "h#", "")


class Features(Protocol):
    """Makes frames of a clip, as `hf_speechcl.features` does."""

    sampling_rate: int
    samples_per_frame: int

    def __call__(self, samples: torch.Tensor) -> np.ndarray:
        """(S,) waveform → (L, T, D), L kinds of frames that are judged each for itself."""


def linear_probe(
    frames: np.ndarray, labels: np.ndarray, test_frames: np.ndarray, test_labels: np.ndarray, l2: float = L2
) -> float:
    """Share of test frames whose label a multinomial logistic regression finds, which was fitted on others.

    Every channel is first brought to mean 0 and standard deviation 1 over the frames to fit. The loss is the mean
    cross-entropy over frames plus l2 / 2 times the squared norm of the weights; L-BFGS starts from zeros, so nothing is
    random.

    Args:
        frames, test_frames: (N, D), (M, D).
        labels, test_labels: (N,), (M,) int; labels that are not among those to fit on are never found.

    Raises:
        ValueError: fewer than two labels to fit on.

    Source: Alain and Bengio 2016, arXiv 1610.01644; of phones in frames, van den Oord et al. 2018, arXiv 1807.03748,
    section 3.1.
    """
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"a probe needs frames of two phones at least, found {len(np.unique(labels))}: give more clips"
        )
    scaler = StandardScaler().fit(frames)
    probe = LogisticRegression(C=1 / (l2 * len(frames)), tol=TOLERANCE, max_iter=1000)
    probe.fit(scaler.transform(frames), labels)
    return float((probe.predict(scaler.transform(test_frames)) == test_labels).mean())


class PhoneProbe:
    """Decoded clips with phones, which frames of any kind are judged by: phone accuracy and ABX error.

    A frame has the phone at its centre. The probe is fitted on frames of one half of the clips and tested on the other
    half; ABX compares the phones of the other half, X, A and B of the same speaker. Silences are left out. Triples are
    the same for all that is measured, and so are frames of the same rate.

    Args:
        fit, test: clips of the two halves.
        sampling_rate: of their samples, in Hz.
        max_frames: to fit on, and to test on, of the first clips.
        same_context: ABX compares phones between the same neighbours only; otherwise in any context, which does with
            few clips.
        min_tokens, max_triples: of ABX, as for `draw_triples`.
        leave_out: labels that are no phones.
        seed: of the triples.

    Raises:
        ValueError: too few phones; says how many.
    """

    def __init__(
        self,
        fit: list[PhoneClip],
        test: list[PhoneClip],
        sampling_rate: int,
        max_frames: int = 6000,
        same_context: bool = False,
        min_tokens: int = 5,
        max_triples: int = 20000,
        leave_out: Sequence[str] = SILENCES,
        seed: int = 0,
    ):
        self.fit, self.test, self.sampling_rate, self.max_frames = fit, test, sampling_rate, max_frames
        names = sorted({phone for clip in fit + test for phone in clip.phones} - set(leave_out))
        self.label_of = {name: number for number, name in enumerate(names)}
        found = [
            (place, number, phone, clip.speaker, ["", *clip.phones][number], [*clip.phones, ""][number + 1])
            for place, clip in enumerate(test)
            for number, phone in enumerate(clip.phones)
            if phone in self.label_of
        ]
        self.tokens = [(place, number) for place, number, *_ in found]
        phones = [phone for _, _, phone, *_ in found]
        groups = [tuple(rest) if same_context else rest[0] for _, _, _, *rest in found]
        self.triples = draw_triples(phones, groups, min_tokens, max_triples, seed)

    @classmethod
    def load(
        cls,
        sources: list[str],
        splits: list[str],
        sampling_rate: int,
        max_clips: int = 60,
        columns: dict[str, str] | None = None,
        seed: int = 0,
        **options,
    ) -> "PhoneProbe":
        """Of a corpus.

        Args:
            sources: as for `load_corpus`.
            splits: one split, of whose clips one half is to fit and one to test, or one to fit and one to test.
            max_clips: of both together, drawn by the seed.
            columns: names of the columns, as for `load_phone_clips`.
            options: of the probe.

        Raises:
            ValueError: as `load_phone_clips`; not one or two splits; or too few clips.
        """
        if not 1 <= len(splits) <= 2:
            raise ValueError(f"splits: expected one, or one to fit on and one to test on, found {' '.join(splits)}")
        if max_clips < 2:
            raise ValueError(f"max_clips must be 2 at least, found {max_clips}")
        count = max_clips // len(splits)
        parts = [load_phone_clips(sources, split, sampling_rate, count, seed, **columns or {}) for split in splits]
        if len(parts) == 1:
            parts = [parts[0][: len(parts[0]) // 2], parts[0][len(parts[0]) // 2 :]]
        if not parts[0]:
            raise ValueError("a probe needs two clips at least, one to fit on and one to test on, found 1")
        return cls(*parts, sampling_rate, seed=seed, **options)

    def measure(self, features: Features) -> list[dict[str, float]]:
        """What each kind of frames is worth: `phone_accuracy`, `majority`, the share of the most frequent phone of the
        frames to test on, and what `abx_error` gives. Not a number for frames that hold numbers that are not finite.

        Raises:
            ValueError: frames for another sampling rate.
        """
        if features.sampling_rate != self.sampling_rate:
            raise ValueError(
                f"a model takes {features.sampling_rate} Hz, and the clips were decoded to {self.sampling_rate} Hz: "
                "measure models of different rates apart"
            )
        fit, test = ([features(torch.from_numpy(clip.samples)) for clip in clips] for clips in (self.fit, self.test))
        seconds = features.samples_per_frame / features.sampling_rate
        return [
            self._measure([frames[kind] for frames in fit], [frames[kind] for frames in test], seconds)
            for kind in range(len(fit[0]))
        ]

    def _measure(self, fit: list[np.ndarray], test: list[np.ndarray], frame_seconds: float) -> dict[str, float]:
        frames, labels = self._labelled(self.fit, fit, frame_seconds)
        test_frames, test_labels = self._labelled(self.test, test, frame_seconds)
        majority = float(np.bincount(test_labels).max() / len(test_labels))
        together = np.concatenate(test)
        if not (np.isfinite(frames).all() and np.isfinite(together).all()):
            return {"phone_accuracy": np.nan, "majority": majority, "abx_error": np.nan, "abx_interval": np.nan}
        places = np.cumsum([0, *map(len, test)])
        segments = [clip.segments(len(own), frame_seconds) for clip, own in zip(self.test, test)]
        starts = np.array([places[clip] + segments[clip][0][number] for clip, number in self.tokens])
        counts = np.array([segments[clip][1][number] for clip, number in self.tokens])
        accuracy = linear_probe(frames, labels, test_frames, test_labels)
        return {"phone_accuracy": accuracy, "majority": majority} | abx_error(together, starts, counts, self.triples)

    def _labelled(self, clips: list[PhoneClip], frames: list[np.ndarray], frame_seconds: float):
        """Frames (N, D) that have a phone, of the first clips, and their labels (N,)."""
        labels = []
        for clip, own in zip(clips, frames):
            names = np.array([self.label_of.get(phone, -1) for phone in clip.phones] + [-1])
            labels.append(names[clip.phone_of_frames(len(own), frame_seconds)])  # -1, no phone, is the last
        labels = np.concatenate(labels)
        rows = np.flatnonzero(labels >= 0)[: self.max_frames]
        return np.concatenate(frames)[rows], labels[rows]
