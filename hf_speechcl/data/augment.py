"""Corruptions of a waveform, as a talker, a room, a microphone and a line make them.

The functions are pure: (S,) float32 in, (S,) float32 out, the input unchanged. `Augmentation` draws their arguments.
"""

import numpy as np
import soxr

from .audio import to_float32
from .dataset import SpeechDataset

CORRUPTIONS = ("speed", "mix", "reverb", "noise", "band_limit", "clipping", "gain", "drop")  # in the order applied
SPEED_FACTOR = (0.9, 1.1)  # Ko et al. 2015, "Audio augmentation for speech recognition": 0.9, 1.0 and 1.1
MIX_RATIO_DB = (-5.0, 5.0)  # this and the next: Chen et al. 2021, arXiv 2110.13900, utterance mixing
MIX_SHARE = 0.5
NOISE_SLOPE = (0.0, 2.0)  # power falls as frequency to this: 0 is white noise, 1 pink, 2 brown
CUTOFF_HZ = (2000.0, 7000.0)  # telephones pass 3.4 kHz, wide-band ones 7 kHz
MAX_CUTOFF = 0.9  # as a share of half the sampling rate
STOP_BAND_DB = 40.0
CLIPPING_SHARE = (0.1, 0.6)  # of the peak; this and the next three are choices of this package
GAIN_DB = (-10.0, 6.0)
DROP_SECONDS = (0.01, 0.1)
DROP_SHARE = 0.2
SILENCE = 1e-6  # RMS below which a sound is too quiet to be brought to a level
TRIES = 4


def _rms(clip: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(clip, dtype=np.float64))))


def _level(sound: np.ndarray, clip: np.ndarray, ratio_db: float) -> float:
    """The factor that brings `sound` to ratio_db below `clip` in RMS, 0 if it is silent."""
    rms = _rms(sound)
    return 0.0 if rms < SILENCE else _rms(clip) / rms * 10 ** (-ratio_db / 20)


def change_speed(clip: np.ndarray, factor: float) -> np.ndarray:
    """Play (S,) `factor` times as fast, pitch and all: (S / factor,), rounded."""
    return soxr.resample(clip, factor, 1.0)


def add_speech(
    clip: np.ndarray, speech: np.ndarray, ratio_db: float, starts: tuple[int, int], length: int
) -> np.ndarray:
    """Add `length` samples of another utterance.

    Args:
        clip: (S,)
        speech: (N,) the whole utterance, as its power is the mean over all of it.
        ratio_db: power of the clip over that of the utterance.
        starts: of the added samples in the clip and in the utterance.
    """
    mixed, (own, other) = clip.copy(), starts
    mixed[own : own + length] += _level(speech, clip, ratio_db) * speech[other : other + length]
    return mixed


def reverberate(clip: np.ndarray, rir: np.ndarray) -> np.ndarray:
    """Play a clip in a room, its RMS kept.

    Args:
        clip: (S,)
        rir: (N,) the room's impulse response from the direct path on, so that the sound keeps its place in time.
    """
    from scipy import signal  # takes half a second, as .rooms does, that runs without reverberation do not spend

    wet = signal.fftconvolve(clip, rir[: len(clip)])[: len(clip)]
    return (wet * (_rms(clip) / max(_rms(wet), np.finfo(np.float32).tiny))).astype(np.float32)


def add_noise(clip: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Add noise (S,) to a clip (S,) at a ratio of their powers. Where either is silent, the clip stays as it is."""
    return clip + (_level(noise, clip, snr_db) * noise).astype(np.float32)


def low_pass(clip: np.ndarray, cutoff: float, sampling_rate: int) -> np.ndarray:
    """Take away what lies above `cutoff` Hz, by STOP_BAND_DB at least and without delay."""
    from scipy import signal

    filter = signal.cheby2(8, STOP_BAND_DB / 2, cutoff, fs=sampling_rate, output="sos")  # runs forth and back
    padding = min(3 * (2 * len(filter) + 1), len(clip) - 1)
    return signal.sosfiltfilt(filter, clip, padlen=padding).astype(np.float32)


def clip_peaks(clip: np.ndarray, share: float) -> np.ndarray:
    """Cut off what exceeds a share of the peak, as an overdriven microphone does."""
    limit = share * float(np.abs(clip).max())
    return np.clip(clip, -limit, limit)


def change_level(clip: np.ndarray, gain_db: float) -> np.ndarray:
    """Louder or quieter, but no sample beyond 1: a greater gain is lowered to that, nothing is cut off."""
    peak, factor = np.abs(clip).max(), 10 ** (gain_db / 20)
    return clip / peak if factor * peak > 1 else clip * np.float32(factor)


def drop_segments(clip: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Zeros in place of segments given in samples, which may overlap."""
    dropped = clip.copy()
    for start, length in zip(starts, lengths):
        dropped[start : start + length] = 0
    return dropped


def coloured_noise(length: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """(length,) Gaussian noise with a mean of 0 whose power falls as frequency to `slope`."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum[1:] *= np.arange(1, len(spectrum)) ** (-slope / 2)
    spectrum[0] = 0
    return np.fft.irfft(spectrum, length)


def random_part(clip: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """(length,) samples from a random place, of the clip repeated where it is shorter."""
    if len(clip) < length:
        clip = np.tile(clip, -(-length // len(clip)) + 1)
    start = rng.integers(len(clip) - length + 1)
    return clip[start : start + length]


def check_probabilities(probabilities: dict[str, float], field: str) -> None:
    """Refuse names that are no corruptions and numbers that are no probabilities; `field` is what the message names."""
    for name, probability in probabilities.items():
        if name not in CORRUPTIONS:
            raise ValueError(f"{field}: found {name!r}, expected names among {', '.join(CORRUPTIONS)}")
        is_number = isinstance(probability, int | float) and not isinstance(probability, bool)
        if not is_number or not 0 <= probability <= 1:
            raise ValueError(f"{field}: found {name}={probability}, expected a number from 0 to 1")


def keeps_time(probabilities: dict[str, float]) -> bool:
    """Whether the length is kept and every sound its place, as targets aligned in time need."""
    return probabilities.get("speed", 0) == 0


class Augmentation:
    """Corruptions of a waveform, each applied with a probability, in the order of CORRUPTIONS.

    Args:
        probabilities: of a corruption by its name; those not named are not applied.
        sampling_rate: of the clips, in Hz.
        snr_db: range of the signal-to-noise ratio of `noise`.
        noise: clips to take noise from; without, it is Gaussian with a slope between white and brown.
        speech: other utterances, for `mix`. The clip itself, if among them, may be drawn too.

    A call draws the same from `rng` whatever it applies, and each corruption has a generator of its own: what one of
    them does to a clip does not depend on the others. A clip of `noise` or `speech` that cannot be decoded is replaced
    by another; after TRIES of them the corruption is left out, as `mix` is for a single sample and `drop` for clips
    shorter than 50 ms.

    Raises:
        ValueError: an unknown name, a probability outside [0, 1], an empty range, `mix` without `speech`, or clips at
            another sampling rate.
    """

    def __init__(
        self,
        probabilities: dict[str, float],
        sampling_rate: int,
        snr_db: tuple[float, float] = (0.0, 20.0),
        noise: SpeechDataset | None = None,
        speech: SpeechDataset | None = None,
    ):
        check_probabilities(probabilities, "probabilities")
        if not snr_db[0] <= snr_db[1]:
            raise ValueError(f"snr_db: found {tuple(snr_db)}, expected the lower bound first")
        if probabilities.get("mix", 0) > 0 and speech is None:
            raise ValueError("speech: found None, expected a SpeechDataset to draw from, as mix has a probability")
        for name, dataset in {"noise": noise, "speech": speech}.items():
            if dataset is not None and dataset.sampling_rate != sampling_rate:
                raise ValueError(f"{name}: found clips at {dataset.sampling_rate} Hz, expected {sampling_rate} Hz")
        self.probabilities, self.sampling_rate, self.snr_db = dict(probabilities), sampling_rate, snr_db
        self.noise, self.speech = noise, speech

    def __call__(self, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Corrupt a clip (S,) float32. Returns (S',) float32, S' = S unless `speed` is applied; the clip itself where
        nothing is."""
        draws, seeds = rng.random(len(CORRUPTIONS)), rng.integers(2**63, size=len(CORRUPTIONS))
        for name, draw, seed in zip(CORRUPTIONS, draws, seeds):
            if draw < self.probabilities.get(name, 0):
                clip = getattr(self, f"_{name}")(clip, np.random.default_rng(seed))
        return clip

    def _speed(self, clip, rng):
        return change_speed(clip, rng.uniform(*SPEED_FACTOR))

    def _mix(self, clip, rng):
        speech, longest = self._draw_clip(self.speech, rng), int(MIX_SHARE * len(clip))
        if speech is None or longest == 0:
            return clip
        length = min(int(rng.integers(longest)) + 1, len(speech))
        starts = tuple(int(rng.integers(size - length + 1)) for size in (len(clip), len(speech)))
        return add_speech(clip, speech, rng.uniform(*MIX_RATIO_DB), starts, length)

    def _reverb(self, clip, rng):
        from .rooms import NUM_ROOMS, room_response

        return reverberate(clip, room_response(int(rng.integers(NUM_ROOMS)), self.sampling_rate))

    def _noise(self, clip, rng):
        snr_db = rng.uniform(*self.snr_db)
        if self.noise is None:
            return add_noise(clip, coloured_noise(len(clip), rng.uniform(*NOISE_SLOPE), rng), snr_db)
        noise = self._draw_clip(self.noise, rng)
        return clip if noise is None else add_noise(clip, random_part(noise, len(clip), rng), snr_db)

    def _band_limit(self, clip, rng):
        highest = min(CUTOFF_HZ[1], MAX_CUTOFF * self.sampling_rate / 2)
        return low_pass(clip, rng.uniform(min(CUTOFF_HZ[0], highest), highest), self.sampling_rate)

    def _clipping(self, clip, rng):
        return clip_peaks(clip, rng.uniform(*CLIPPING_SHARE))

    def _gain(self, clip, rng):
        return change_level(clip, rng.uniform(*GAIN_DB))

    def _drop(self, clip, rng):
        shortest, longest = (round(seconds * self.sampling_rate) for seconds in DROP_SECONDS)
        longest = min(longest, int(DROP_SHARE * len(clip)))
        if longest < shortest:
            return clip
        count = rng.integers(int(DROP_SHARE * len(clip)) // longest) + 1
        lengths = rng.integers(shortest, longest + 1, size=count)
        return drop_segments(clip, rng.integers(len(clip) - lengths + 1), lengths)

    @staticmethod
    def _draw_clip(dataset: SpeechDataset, rng: np.random.Generator) -> np.ndarray | None:
        for index in rng.integers(len(dataset), size=TRIES):
            clip = dataset[0, int(index)]["input_values"]
            if clip is not None:
                return to_float32(clip)
        return None
