"""A recording as utterances, windows and batches of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechcl.data.audio import read_audio, stream_audio
from hf_speechcl.recordings import (
    batch_by_length,
    cut_windows,
    find_utterances,
    group_windows,
    measure_levels,
)
from tests.recognizers import RATE, write


def test_an_utterance_begins_and_ends_with_its_sound():
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE).astype(np.float32)
    silence = np.zeros(RATE, np.float32)
    levels, num_samples = measure_levels([np.concatenate([silence, tone, silence, tone, silence])], RATE)
    found = find_utterances(levels, num_samples, RATE, pause_seconds=0.5)
    for (begin, end), first in zip(found, (1, 3), strict=True):
        assert (first - 0.25) * RATE <= begin <= first * RATE
        assert (first + 1) * RATE <= end <= (first + 1.25) * RATE


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 48000])
def test_streamed_audio_is_the_audio_read_at_once(clips, tmp_path, rate):
    audio = {"path": write(tmp_path / "a.wav", np.stack([clips[3], 0.5 * clips[3]], 1), rate)}
    blocks = list(stream_audio(audio, RATE, block_seconds=0.3))
    expected = read_audio(audio, RATE)
    streamed = np.concatenate(blocks)
    assert abs(len(streamed) - len(expected)) <= 1
    size = min(len(streamed), len(expected))
    np.testing.assert_allclose(streamed[:size], expected[:size], atol=1e-3)
    assert max(map(len, blocks)) < RATE


def test_utterances_lie_between_pauses_even_in_noise(clips):
    rng = np.random.default_rng(0)
    speech = [clip / np.abs(clip).max() for clip in clips[:4]]
    for noise in (0.0, 1e-4, 1e-2):
        parts, spans, place = [], [], 0
        for clip in speech:
            gap = int((0.9 + 0.3 * rng.random()) * RATE)
            parts += [np.zeros(gap, np.float32), clip]
            spans.append((place + gap, place + gap + len(clip)))
            place += gap + len(clip)
        samples = np.concatenate(parts) + noise * rng.normal(size=place).astype(np.float32)
        levels, num_samples = measure_levels(np.array_split(samples, 5), RATE)
        assert num_samples == place
        found = find_utterances(levels, num_samples, RATE, pause_seconds=0.6)
        assert len(found) == len(spans), noise
        for (begin, end), (first, last) in zip(found, spans):
            assert first - 0.35 * RATE <= begin <= first + 0.3 * RATE
            assert last - 0.6 * RATE <= end <= last + 0.35 * RATE
        on_frames = find_utterances(levels, num_samples, RATE, pause_seconds=0.6, grid=640)
        assert [begin // 640 * 640 for begin, _ in found] == [begin for begin, _ in on_frames]
        assert find_utterances(levels, num_samples, RATE, pause_seconds=0) == [(0, place)]
    halves = find_utterances(levels, num_samples, RATE, pause_seconds=0, max_seconds=4)
    assert [begin for begin, _ in halves[1:]] == [end for _, end in halves[:-1]]
    assert max(end - begin for begin, end in halves) <= 4 * RATE
    assert find_utterances(*measure_levels([], RATE), RATE, pause_seconds=0.5) == []
    for chunk_seconds in (1.151, 1.155, 1.16):
        pieces = find_utterances(levels, num_samples, RATE, pause_seconds=0, max_seconds=chunk_seconds)
        assert max(end - begin for begin, end in pieces) <= chunk_seconds * RATE


def test_clip_without_a_pause_is_read_as_it_is(clips):
    for clip in clips:
        levels, num_samples = measure_levels([clip], RATE)
        assert find_utterances(levels, num_samples, RATE, 3.0) == [(0, len(clip))]
    padded = np.concatenate([np.zeros(4 * RATE, np.float32), clips[2], np.zeros(4 * RATE, np.float32)])
    ((begin, end),) = find_utterances(*measure_levels([padded], RATE), RATE, 3.0)
    assert 3.5 * RATE < begin < 4.3 * RATE
    assert len(padded) - 4.3 * RATE < end < len(padded) - 3.5 * RATE


def test_windows_hold_no_more_than_a_chunk_of_the_recording():
    recording = (np.full(1000, block, np.float32) for block in range(500))
    utterances = [(1500, 3500), (10_000, 10_001), (20_000, 450_000)]
    windows = list(cut_windows(recording, utterances, length=6000, stride=1000))
    assert max(len(window.samples) for window in windows) <= 6000
    place = [begin for begin, _ in utterances]
    for window in windows:
        assert window.samples[window.left] == place[0] // 1000
        place[0] += window.length
        if window.is_last:
            assert place.pop(0) == utterances[len(utterances) - len(place) - 1][1]
    assert place == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 60))
def test_batches_hold_every_window_once_and_with_padding_no_more_than_they_may(lengths, limit):
    batches = batch_by_length(lengths, limit)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[place] for place in batch) <= limit


def test_groups_hold_all_windows_in_their_order_and_no_more_of_the_recording_than_is_needed():
    read = []
    blocks = (read.append(block) or np.full(1000, block, np.float32) for block in range(100))
    groups = group_windows(cut_windows(blocks, [(0, 30_500), (40_000, 100_000)], 6000, 1000), 12_000)
    first = next(groups)
    assert [window.samples[window.left] for window in first] == [0, 4, 8]
    assert len(read) < 20
    assert sum(window.length for group in [first, *groups] for window in group) == 90_500
