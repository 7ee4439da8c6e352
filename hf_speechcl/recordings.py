"""A recording of any length → utterances between pauses → windows that a model can hold."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .command_line import option

LEVEL_SECONDS = 0.02  # levels are measured over so much
SURROUNDINGS_SECONDS = 30.0  # to either side: what is quiet and what is loud is judged by
QUIET_SHARE = 0.35  # of the way from the noise floor to the level of speech; pauses lie below
LARGEST_RANGE = 40.0  # dB below speech that a pause may well have: digital silence elsewhere must not hide it
KEPT_SILENCE = 0.15  # seconds of a pause that stay with the utterance on either side


@dataclass
class RecordingArguments:
    """How long recordings are cut."""

    pause_seconds: float = option(
        0.5, "Recordings are cut at pauses from this length on, in seconds, and read utterance by utterance; 0: never."
    )
    chunk_seconds: float = option(30.0, "What is longer without a pause is read in overlapping chunks of this length.")

    def __post_init__(self):
        if self.pause_seconds < 0:
            raise ValueError(f"pause_seconds must not be negative, found {self.pause_seconds}")
        if self.chunk_seconds <= 0:
            raise ValueError(f"chunk_seconds must be positive, found {self.chunk_seconds}")


@dataclass
class Window:
    """A part of an utterance, with its surroundings.

    Attributes:
        samples: (S,) float32, of which `left` at the beginning and those beyond `left + length` are surroundings.
        is_last: of its utterance.
    """

    samples: np.ndarray
    left: int
    length: int
    is_last: bool


def measure_levels(blocks: Iterable[np.ndarray], sampling_rate: int) -> tuple[np.ndarray, int]:
    """Level of every 20 ms in dB below full scale, at least -100, and the number of samples."""
    size = round(LEVEL_SECONDS * sampling_rate)
    levels, rest, num_samples = [], np.zeros(0, np.float32), 0
    for block in blocks:
        num_samples += len(block)
        rest = np.concatenate([rest, block])
        whole = len(rest) // size * size
        levels.append((rest[:whole].reshape(-1, size).astype(np.float64) ** 2).mean(1))
        rest = rest[whole:]
    if len(rest):
        levels.append(np.array([(rest.astype(np.float64) ** 2).mean()]))
    power = np.concatenate(levels) if levels else np.zeros(0)
    return 10 * np.log10(power + 1e-10), num_samples


def find_quiet(levels: np.ndarray) -> np.ndarray:
    """Which of the levels are those of a pause: far below the speech and near the noise of the surrounding minute."""
    step, reach = round(1 / LEVEL_SECONDS), round(SURROUNDINGS_SECONDS / LEVEL_SECONDS)
    quiet = np.zeros(len(levels), bool)
    for begin in range(0, len(levels), step):
        noise, speech = np.percentile(levels[max(0, begin - reach) : begin + step + reach], [10, 90])
        noise = max(noise, speech - LARGEST_RANGE)
        quiet[begin : begin + step] = levels[begin : begin + step] < noise + QUIET_SHARE * (speech - noise)
    return quiet


def find_utterances(
    levels: np.ndarray,
    num_samples: int,
    sampling_rate: int,
    pause_seconds: float,
    max_seconds: float | None = None,
    grid: int = 1,
) -> list[tuple[int, int]]:
    """First sample and last sample + 1 of every stretch between pauses.

    Args:
        levels, num_samples: of `measure_levels`.
        pause_seconds: length from which silence is a pause; 0 makes the whole recording one stretch.
        max_seconds: longer stretches are cut where they are quietest, in their second half; not at all by default.
        grid: utterances begin at multiples of so many samples, so that their frames are those of the recording.
    """
    quiet = find_quiet(levels) if pause_seconds else np.zeros(len(levels), bool)
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    shortest, kept = pause_seconds / LEVEL_SECONDS, KEPT_SILENCE / LEVEL_SECONDS
    spans, begin, reached = [], 0, 0
    for start, end in edges:
        if end - start >= shortest:
            at_edge = start == 0 or end == len(levels)
            stay = min(kept, (end - start) / (1 if at_edge else 2))
            if start > begin:
                spans.append((begin, start + stay))
            begin, reached = end - stay, end
    if reached < len(levels):
        spans.append((begin, len(levels)))
    size = round(LEVEL_SECONDS * sampling_rate)
    longest = len(levels) if max_seconds is None else int(max_seconds / LEVEL_SECONDS + 1e-9)
    utterances = []
    for begin, end in ((round(begin), round(end)) for begin, end in spans):
        while end - begin > longest:
            cut = begin + longest // 2 + int(levels[begin + longest // 2 : begin + longest].argmin())
            utterances.append((begin * size, cut * size))
            begin = cut
        utterances.append((begin * size // grid * grid, min(end * size, num_samples)))
    return utterances


def cut_windows(
    blocks: Iterable[np.ndarray], utterances: list[tuple[int, int]], length: int, stride: int
) -> Iterator[Window]:
    """The windows of all utterances in their order, from a recording that is read once.

    Args:
        blocks: samples of the recording.
        utterances: of `find_utterances`.
        length: samples of the longest window; longer utterances come in several.
        stride: samples of surroundings to either side of a window within its utterance.
    """
    reader = _Reader(blocks)
    for begin, end in utterances:
        core = length if end - begin <= length else length - 2 * stride
        for start in range(begin, end, core):
            stop = min(start + core, end)
            first = max(begin, start - stride)
            yield Window(reader.read(first, min(end, stop + stride)), start - first, stop - start, stop == end)


def group_windows(windows: Iterable[Window], max_samples: int) -> Iterator[list[Window]]:
    """Successive windows, so many that the samples of a group reach `max_samples`."""
    group, num_samples = [], 0
    for window in windows:
        group.append(window)
        num_samples += len(window.samples)
        if num_samples >= max_samples:
            yield group
            group, num_samples = [], 0
    if group:
        yield group


def batch_by_length(lengths: list[int], max_samples: int) -> list[list[int]]:
    """Places of `lengths`, the shortest first, in batches that hold at most `max_samples` with their padding; what is
    longer is alone."""
    batches: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not batches or (len(batches[-1]) + 1) * lengths[place] > max_samples:
            batches.append([])
        batches[-1].append(place)
    return batches


class _Reader:
    """Reads parts of a stream by their place; no part may begin before the one read last."""

    def __init__(self, blocks: Iterable[np.ndarray]):
        self.blocks, self.buffer, self.origin = iter(blocks), np.zeros(0, np.float32), 0

    def read(self, begin: int, end: int) -> np.ndarray:
        parts, reached = [self.buffer], self.origin + len(self.buffer)
        while reached < end and (block := next(self.blocks, None)) is not None:
            if reached <= begin:
                parts, self.origin = [], reached
            parts.append(block)
            reached += len(block)
        self.buffer = np.concatenate(parts)[max(0, begin - self.origin) :]
        self.origin = max(begin, self.origin)
        return self.buffer[: end - begin].copy()
