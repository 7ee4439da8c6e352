"""Clips with the phones that are said in them, and which frames belong to which phone."""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow

from .audio import AudioError, read_audio
from .corpora import load_corpus

logger = logging.getLogger(__name__)

MAX_SECONDS = 10.0  # of a clip, so that long recordings neither fill the memory nor take the place of other clips


@dataclass(frozen=True)
class PhoneClip:
    """A decoded clip and its phones.

    Attributes:
        samples: (S,) float32 waveform.
        phones: of the P phones that end within the samples, in order.
        ends: (P,) seconds from the clip's start at which they end. A phone starts where the one before ends, the first
            at 0.
        speaker: "" where none is known, the clip's id where those of others are.
    """

    samples: np.ndarray
    phones: list[str]
    ends: np.ndarray
    speaker: str

    def phone_of_frames(self, num_frames: int, frame_seconds: float) -> np.ndarray:
        """(T,) number of the phone at the centre of each frame, (t + 0.5) * frame_seconds; -1 after the last phone."""
        numbers = np.searchsorted(self.ends, (np.arange(num_frames) + 0.5) * frame_seconds, side="right")
        return np.where(numbers < len(self.ends), numbers, -1)

    def segments(self, num_frames: int, frame_seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """First frame (P,) and number of frames (P,) of each phone: those whose centres are in it.

        A phone in which no centre is has the frame that its own centre is in.
        """
        starts = np.concatenate([[0.0], self.ends[:-1]])
        centres = (np.arange(num_frames) + 0.5) * frame_seconds
        first, end = np.searchsorted(centres, starts), np.searchsorted(centres, self.ends)
        nearest = np.minimum(((starts + self.ends) / 2 / frame_seconds).astype(int), num_frames - 1)
        return np.where(end > first, first, nearest), np.maximum(end - first, 1)


def load_phone_clips(
    sources: str | list[str],
    split: str,
    sampling_rate: int,
    max_clips: int,
    seed: int = 0,
    phones_column: str = "phones",
    phone_ends_column: str = "phone_ends",
    speaker_column: str = "speaker",
    audio_column: str = "audio",
) -> list[PhoneClip]:
    """Decode some clips of a corpus, drawn by the seed; what cannot be used is logged, counted and left out.

    Args:
        sources, split, audio_column: as for `load_corpus`.
        sampling_rate: in Hz.
        max_clips: how many are decoded at most, the first `MAX_SECONDS` of each.
        phones_column: column of lists of phones.
        phone_ends_column: column of lists of the phones' ends in seconds.
        speaker_column: column of speakers; a corpus without it counts as one speaker, of others a clip without one as
            a speaker of its own.

    Raises:
        ValueError: a column of phones or ends is missing or holds something else, or no clip can be used.
    """
    lists = {phones_column: pyarrow.string(), phone_ends_column: pyarrow.float64()}
    corpus = load_corpus(sources, split, audio_column, keep_columns=(speaker_column,), list_columns=lists)
    clips, skipped = [], 0
    is_known = any(speaker is not None for speaker in corpus[speaker_column])
    for row in np.random.default_rng(seed).permutation(len(corpus)).tolist():
        if len(clips) == max_clips:
            break
        clip = corpus[row]
        try:
            phones, ends = _check(clip[phones_column], clip[phone_ends_column])
            samples = read_audio(clip["audio"], sampling_rate, duration=MAX_SECONDS)
            inside = int(np.searchsorted(ends, len(samples) / sampling_rate + 0.01, side="right"))
            if inside == 0:
                raise AudioError("no phone ends within its audio")
            speaker = clip[speaker_column] or (clip["id"] if is_known else "")
            clips.append(PhoneClip(samples, phones[:inside], ends[:inside], speaker))
        except AudioError as error:
            skipped += 1
            logger.warning("skipped %s: %s", clip["id"], error)
    logger.info("clips with phones, split %s: %d of %d are taken, %d skipped", split, len(clips), len(corpus), skipped)
    if not clips:
        raise ValueError(
            f"split {split!r} has no clip with {phones_column} and {phone_ends_column} that can be used: see above"
        )
    return clips


def _check(phones: list[str] | None, ends: list[float] | None) -> tuple[list[str], np.ndarray]:
    if not phones or not ends or len(phones) != len(ends):
        raise AudioError(f"{len(phones or [])} phones with {len(ends or [])} ends: expected one end for each")
    seconds = np.array(ends, dtype=float)
    if None in phones or not np.isfinite(seconds).all() or (np.diff(seconds, prepend=0) < 0).any():
        raise AudioError("phones that are null, or ends that do not rise from 0 in seconds")
    return phones, seconds
