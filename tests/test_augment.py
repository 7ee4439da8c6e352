"""Corruptions: each does exactly what it says, by its generator alone, on real clips and on hardly any."""

import pickle
import random

import numpy as np
import pyroomacoustics
import pytest
import soundfile
import torch
from scipy import signal

from hf_speechcl import load_corpus
from hf_speechcl.data import SpeechDataset, augment, rooms
from hf_speechcl.data.augment import CORRUPTIONS, Augmentation, keeps_time

RATE = 16000
KEEPING_LENGTH = [name for name in CORRUPTIONS if name != "speed"]
EDGE_CLIPS = {
    "silence": np.zeros(RATE, dtype=np.float32),
    "one_sample": np.full(1, 0.5, dtype=np.float32),
    "two_samples": np.array([0.5, -0.5], dtype=np.float32),
    "ten_milliseconds": np.sin(np.arange(160, dtype=np.float32)),
    "constant": np.full(RATE, 0.3, dtype=np.float32),
    "hardly_audible": np.full(RATE, 1e-30, dtype=np.float32),
    "too_loud": np.float32(100) * np.sin(np.arange(RATE, dtype=np.float32)),
}


@pytest.fixture(scope="module")
def speech(corpus):
    return SpeechDataset(corpus, RATE)


@pytest.fixture(scope="module", autouse=True)
def _two_rooms():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rooms, "NUM_ROOMS", 2)  # each takes a tenth of a second
        yield


def only(name, speech, **options):
    return Augmentation({name: 1.0}, RATE, speech=speech, **options)


def power_db(clip):
    return 10 * np.log10(np.mean(np.square(clip, dtype=np.float64)))


# ---- the functions ----


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 13.7, 40.0])
def test_noise_is_added_at_the_ratio_asked_for(snr_db, clips):
    noise = augment.coloured_noise(len(clips[3]), 1.0, np.random.default_rng(0))
    noisy = augment.add_noise(clips[3], noise, snr_db)
    assert power_db(clips[3]) - power_db(noisy - clips[3]) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_colour_of_noise(slope):
    noise = augment.coloured_noise(2**17, slope, np.random.default_rng(0))
    frequencies, power = signal.welch(noise, RATE, nperseg=4096)
    band = (frequencies > 100) & (frequencies < 7000)
    fitted, _ = np.polyfit(np.log(frequencies[band]), np.log(power[band]), 1)
    assert -fitted == pytest.approx(slope, abs=0.05)


def test_speech_is_added_at_its_ratio_and_place(clips):
    clip, other = clips[4], clips[3]
    mixed = augment.add_speech(clip, other, 3.0, (500, 200), 4000)
    added = (mixed - clip)[500:4500]
    factor = np.dot(added, other[200:4200]) / np.dot(other[200:4200], other[200:4200])
    assert power_db(clip) - power_db(factor * other) == pytest.approx(3.0, abs=0.01)
    np.testing.assert_allclose(added, factor * other[200:4200], atol=1e-6)
    assert np.array_equal(mixed[:500], clip[:500])
    assert np.array_equal(mixed[4500:], clip[4500:])


@pytest.mark.parametrize("cutoff", [2000, 3400, 7000])
def test_low_pass_takes_away_what_is_above_and_leaves_what_is_below(cutoff):
    noise = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32)
    frequencies, before = signal.welch(noise, RATE, nperseg=1024)
    _, after = signal.welch(augment.low_pass(noise, cutoff, RATE), RATE, nperseg=1024)
    change_db = 10 * np.log10(after / before)
    assert change_db[frequencies > cutoff + 50].max() < -30
    assert abs(change_db[(frequencies > 50) & (frequencies < 0.7 * cutoff)]).max() < 0.5


def test_clipping_cuts_at_a_share_of_the_peak_and_nothing_else(clips):
    clipped = augment.clip_peaks(clips[3], 0.3)
    limit = 0.3 * np.abs(clips[3]).max()
    assert np.abs(clipped).max() == pytest.approx(limit)
    below = np.abs(clips[3]) < limit
    assert 0 < below.sum() < len(below)
    assert np.array_equal(clipped[below], clips[3][below])


def test_gain_is_as_asked_unless_a_sample_would_leave_the_range(clips):
    quiet = clips[3] / np.abs(clips[3]).max() / 4
    np.testing.assert_allclose(augment.change_level(quiet, 6.0), quiet * 10**0.3, rtol=1e-6)
    np.testing.assert_allclose(augment.change_level(quiet, -6.0), quiet * 10**-0.3, rtol=1e-6)
    loudest = augment.change_level(quiet, 20.0)
    assert np.abs(loudest).max() == 1
    np.testing.assert_allclose(loudest, 4 * quiet, rtol=1e-6)


def test_dropped_segments_are_zero_and_the_rest_is_kept(clips):
    dropped = augment.drop_segments(clips[3], [100, 8000], [160, 1600])
    inside = np.zeros(len(clips[3]), dtype=bool)
    inside[100:260] = inside[8000:9600] = True
    assert not dropped[inside].any()
    assert np.array_equal(dropped[~inside], clips[3][~inside])


@pytest.mark.parametrize("factor", [0.9, 0.97, 1.1])
def test_speed_changes_length_and_pitch_by_its_factor(factor):
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * RATE) / RATE).astype(np.float32)
    changed = augment.change_speed(tone, factor)
    assert len(changed) == round(len(tone) / factor)
    spectrum = np.abs(np.fft.rfft(changed * np.hanning(len(changed))))
    assert spectrum.argmax() * RATE / len(changed) == pytest.approx(1000 * factor, abs=0.5)


def test_part_of_a_short_clip_repeats_it(clips):
    part = augment.random_part(clips[0], 3 * len(clips[0]), np.random.default_rng(0))
    assert len(part) == 3 * len(clips[0])
    assert np.array_equal(part[: len(clips[0])], part[len(clips[0]) : 2 * len(clips[0])])
    inner = augment.random_part(clips[4], 1000, np.random.default_rng(0))
    starts = [start for start in range(len(clips[4]) - 999) if clips[4][start] == inner[0]]
    assert any(np.array_equal(clips[4][start : start + 1000], inner) for start in starts)


# ---- rooms ----


@pytest.mark.parametrize("index", range(4))
def test_a_room_keeps_the_time_the_length_and_the_level(index, clips):
    rir = rooms.room_response(index, RATE)
    assert np.abs(rir).argmax() == 0
    wet = augment.reverberate(clips[4], rir)
    assert wet.shape == clips[4].shape
    assert power_db(wet) == pytest.approx(power_db(clips[4]), abs=0.01)
    whisper = augment.reverberate(clips[4] * np.float32(1e-8), rir)
    assert power_db(whisper) == pytest.approx(power_db(clips[4]) - 160, abs=0.01)
    spectra = np.fft.rfft(wet, 2 * len(wet)) * np.fft.rfft(clips[4], 2 * len(wet)).conj()
    assert np.fft.irfft(spectra / np.abs(spectra)).argmax() == 0  # of the whitened clips: speech resembles itself
    impulse = np.zeros(RATE, dtype=np.float32)
    impulse[1000] = 1
    assert not augment.reverberate(impulse, rir)[:990].round(6).any()  # no sound before its cause


def test_rooms_differ_and_are_the_same_on_any_number_of_threads(monkeypatch):
    first = rooms.room_response(0, RATE)
    assert not np.array_equal(first[:100], rooms.room_response(1, RATE)[:100])
    rooms.room_response.cache_clear()
    monkeypatch.setitem(pyroomacoustics.parameters._constants, "num_threads", 5)
    assert np.array_equal(rooms.room_response(0, RATE), first)
    assert pyroomacoustics.constants.get("num_threads") == 5


def test_sound_in_a_room_dies_away():
    energy = rooms.room_response(0, RATE).astype(np.float64) ** 2
    remaining_db = 10 * np.log10(energy[::-1].cumsum()[::-1] / energy.sum())
    seconds = np.argmax(remaining_db < -60) / RATE
    assert 0.1 < seconds < 2.5


# ---- what is drawn ----


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_at_probability_1_a_corruption_changes_a_clip_and_at_0_it_does_not(name, clips, speech):
    before = clips[4].copy()
    corrupted = only(name, speech)(clips[4], np.random.default_rng(0))
    assert corrupted.dtype == np.float32
    assert np.isfinite(corrupted).all()
    assert not np.array_equal(corrupted, clips[4])
    assert np.array_equal(before, clips[4])
    untouched = Augmentation({name: 0.0}, RATE, speech=speech)(clips[4], np.random.default_rng(0))
    assert np.array_equal(untouched, clips[4])


def test_a_corruption_is_applied_as_often_as_its_probability_says(clips):
    augmentation, rng = Augmentation({"gain": 0.3}, RATE), np.random.default_rng(0)
    share = np.mean([not np.array_equal(augmentation(clips[0], rng), clips[0]) for _ in range(2000)])
    assert share == pytest.approx(0.3, abs=0.04)


def test_everything_is_a_function_of_clip_and_seed_alone(clips, speech):
    augmentation = Augmentation(dict.fromkeys(CORRUPTIONS, 1.0), RATE, speech=speech)
    first = augmentation(clips[3], np.random.default_rng(7))
    for seed in range(3):
        augmentation(clips[2], np.random.default_rng(seed))
        np.random.seed(seed), random.seed(seed), torch.manual_seed(seed), pyroomacoustics.random.seed(seed)
    rooms.room_response.cache_clear()
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    assert np.array_equal(augmentation(clips[3], np.random.default_rng(7)), first)
    assert np.array_equal(np.random.get_state()[1], states[0])
    assert random.getstate() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    other = augmentation(clips[3], np.random.default_rng(8))
    assert len(other) != len(first) or not np.array_equal(other, first)


def test_what_one_corruption_draws_does_not_depend_on_the_others():
    ones = np.ones(2 * RATE, dtype=np.float32)
    alone = Augmentation({"drop": 1.0}, RATE)(ones, np.random.default_rng(3))
    both = Augmentation({"noise": 1.0, "drop": 1.0}, RATE)(ones, np.random.default_rng(3))
    assert np.array_equal(both == 0, alone == 0)


def test_drawn_noise_is_within_its_range(clips, speech):
    for noise in (None, speech):
        augmentation = only("noise", speech, snr_db=(3.0, 9.0), noise=noise)
        ratios = [
            power_db(clips[3]) - power_db(augmentation(clips[3], np.random.default_rng(seed)) - clips[3])
            for seed in range(40)
        ]
        assert 3 - 0.01 <= min(ratios) < 4.5
        assert 7.5 < max(ratios) <= 9 + 0.01


def test_half_of_a_clip_at_least_is_the_main_speaker_alone(clips, speech):
    for seed in range(40):
        mixed = only("mix", speech)(clips[3], np.random.default_rng(seed))
        changed = np.flatnonzero(mixed != clips[3])
        assert changed[-1] - changed[0] < len(clips[3]) / 2


def test_a_fifth_of_a_clip_at_most_is_dropped(clips):
    ones = np.ones(len(clips[4]), dtype=np.float32)
    shares = [(only("drop", None)(ones, np.random.default_rng(seed)) == 0).mean() for seed in range(100)]
    assert min(shares) > 0
    assert 0.1 < max(shares) <= 0.2


def test_speed_is_the_only_one_that_moves_sounds_in_time(clips, speech):
    assert keeps_time(only("drop", speech).probabilities)
    assert keeps_time({"speed": 0.0, "reverb": 1.0})
    assert not keeps_time({"speed": 0.1})
    lengths = [len(only("speed", speech)(clips[4], np.random.default_rng(seed))) for seed in range(40)]
    assert len(clips[4]) / 1.1 - 1 < min(lengths) < len(clips[4]) / 1.07
    assert len(clips[4]) / 0.93 < max(lengths) < len(clips[4]) / 0.9 + 1


@pytest.mark.parametrize("rate", [4000, 8000, 48000])
def test_other_sampling_rates(rate):
    clip = np.random.default_rng(0).standard_normal(rate).astype(np.float32)
    corrupted = Augmentation({"band_limit": 1.0, "drop": 1.0, "noise": 1.0}, rate)(clip, np.random.default_rng(0))
    assert corrupted.shape == clip.shape
    assert np.isfinite(corrupted).all()


# ---- clips of hardly anything ----


@pytest.mark.parametrize("kind", EDGE_CLIPS)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_edge_clips_stay_finite_and_keep_their_length(name, kind, speech):
    clip = EDGE_CLIPS[kind]
    for noise in (None, speech):
        corrupted = only(name, speech, noise=noise)(clip, np.random.default_rng(1))
        assert corrupted.dtype == np.float32
        assert np.isfinite(corrupted).all()
        assert name == "speed" or corrupted.shape == clip.shape
        assert len(clip) / 1.1 - 0.5 <= len(corrupted) <= len(clip) / 0.9 + 0.5
    if kind == "silence":
        assert not corrupted.any()


def test_all_at_once_on_edge_clips(speech):
    augmentation = Augmentation(dict.fromkeys(KEEPING_LENGTH, 1.0), RATE, speech=speech)
    for clip in EDGE_CLIPS.values():
        corrupted = augmentation(clip, np.random.default_rng(0))
        assert corrupted.shape == clip.shape
        assert corrupted.dtype == np.float32
        assert np.isfinite(corrupted).all()
        assert np.abs(corrupted).max() <= 1


def test_clips_that_cannot_be_decoded_are_drawn_again_or_left_out(tmp_path, clips):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.zeros(RATE), RATE)
    silent = SpeechDataset(load_corpus(str(tmp_path)), RATE)
    for name in ("mix", "noise"):
        left = only(name, silent, noise=silent)(clips[3], np.random.default_rng(0))
        assert np.array_equal(left, clips[3])
    soundfile.write(tmp_path / "speech.wav", clips[2], RATE)
    mixed = SpeechDataset(load_corpus(str(tmp_path)), RATE)
    changed = [
        not np.array_equal(only("noise", mixed, noise=mixed)(clips[3], np.random.default_rng(seed)), clips[3])
        for seed in range(60)
    ]
    assert np.mean(changed) == pytest.approx(1 - 0.75**4, abs=0.2)


# ---- the class ----


def test_a_pickled_augmentation_does_the_same(clips, speech):
    augmentation = Augmentation(dict.fromkeys(CORRUPTIONS, 1.0), RATE, noise=speech, speech=speech)
    copy = pickle.loads(pickle.dumps(augmentation))
    expected = augmentation(clips[2], np.random.default_rng(0))
    assert np.array_equal(copy(clips[2], np.random.default_rng(0)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"probabilities": {"echo": 0.5}},
            "probabilities: found 'echo', expected names among speed, mix, reverb, noise",
        ),
        ({"probabilities": {"gain": 1.5}}, "probabilities: found gain=1.5, expected a number from 0 to 1"),
        ({"probabilities": {"gain": -0.1}}, "found gain=-0.1"),
        ({"probabilities": {"gain": float("nan")}}, "found gain=nan"),
        ({"probabilities": {"noise": 1.0}, "snr_db": (20.0, 0.0)}, r"snr_db: found \(20.0, 0.0\), expected the lower"),
        ({"probabilities": {"mix": 0.1}}, "speech: found None, expected a SpeechDataset"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(sampling_rate=RATE, **options)


def test_clips_at_another_rate_are_refused(speech):
    for name in ("noise", "speech"):
        with pytest.raises(ValueError, match=f"{name}: found clips at 16000 Hz, expected 8000 Hz"):
            Augmentation({"mix": 0.0}, 8000, **{name: speech})
