"""Decoding of one clip, of every format, and of bad ones."""

import io

import numpy as np
import pytest
import soundfile

from hf_speechcl.data.audio import AudioError, read_audio, read_duration
from tests.conftest import wav_bytes


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 96000])
@pytest.mark.parametrize("channels", [1, 2])
def test_any_rate_and_channel_count_becomes_mono_at_16_khz(rate, channels):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = read_audio({"bytes": wav_bytes(np.stack([tone] * channels, axis=1), rate), "path": None}, 16000)
    assert samples.dtype == np.float32
    assert samples.shape == (16000,)
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() == 440


@pytest.mark.parametrize(
    ("format", "subtype"),
    [
        ("WAV", "PCM_U8"),
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ],
)
def test_common_formats_decode(format, subtype, clips):
    encoded = wav_bytes(clips[2], 16000, subtype, format)
    decoded = read_audio({"bytes": encoded, "path": None}, 16000)
    size = min(len(decoded), len(clips[2]))
    assert np.corrcoef(decoded[:size], clips[2][:size])[0, 1] > 0.9


def test_part_of_a_clip_equals_the_slice_of_the_whole(clips):
    audio = {"bytes": wav_bytes(clips[3], subtype="FLOAT"), "path": None}
    part = read_audio(audio, 16000, start=0.25, duration=0.5)
    np.testing.assert_array_equal(part, clips[3][4000:12000])


def first_half(**format):
    def make(clip):
        encoded = wav_bytes(clip, **format)
        return encoded[: len(encoded) // 2]

    return make


def not_a_number(clip):
    return wav_bytes(np.where(np.arange(len(clip)) == 100, np.nan, clip), subtype="FLOAT")


def without_length(clip):
    encoded = bytearray(wav_bytes(clip, format="FLAC"))
    encoded[21] &= 0xF0  # the number of samples, 36 bits of the first block
    encoded[22:26] = bytes(4)
    return bytes(encoded)


def twice(**format):
    return lambda clip: wav_bytes(clip, **format) + wav_bytes(clip[::-1], **format)


def headless_mp3(clip, mode):
    """Frames alone, without the one that says how many there are; the first of a high bit rate."""
    noise = np.random.default_rng(0).uniform(-0.9, 0.9, 16000)
    sound = np.concatenate([noise, np.zeros(5 * 16000), clip]).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, sound, 16000, format="MP3", bitrate_mode=mode, compression_level=0.5)
    encoded = stream.getvalue()
    return len(sound), encoded[encoded.index(encoded[:2], 4) :]


BAD_BYTES = {
    "a_flac_of_unknown_length": (without_length, "does not say how long it is: re-encode"),
    "two_oggs": (twice(format="OGG", subtype="OPUS"), "several Ogg streams"),
    "two_mp3s": (twice(format="MP3", subtype="MPEG_LAYER_III"), r"MP3 of [\d.]+ s, [\d.]+ s would be read"),
    "an_mp3_of_guessed_length": (lambda clip: headless_mp3(clip, "VARIABLE")[1], r"MP3 of [\d.]+ s, [\d.]+ s would"),
    "empty": (lambda clip: b"", "empty file"),
    "text": (lambda clip: b"this is no audio\n" * 100, "not readable as audio"),
    "header_only": (lambda clip: wav_bytes(clip[:0]), "no samples"),
    "half_a_wav": (first_half(), r"truncated: \d+ of \d+ bytes"),
    "half_an_aiff": (first_half(format="AIFF"), r"truncated: \d+ of \d+ bytes"),
    "half_a_vorbis": (first_half(format="OGG", subtype="VORBIS"), "truncated: its last Ogg page"),
    "half_an_opus": (first_half(format="OGG", subtype="OPUS"), "truncated: its last Ogg page"),
    "half_a_flac": (first_half(format="FLAC"), "cannot be decoded"),
    "half_an_mp3": (first_half(format="MP3", subtype="MPEG_LAYER_III"), r"truncated: [\d.]+ s of [\d.]+ s"),
    "not_a_number": (not_a_number, "not finite"),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_audio_is_refused_with_the_reason(kind, clips):
    make, message = BAD_BYTES[kind]
    audio = {"bytes": make(clips[4]), "path": None}
    with pytest.raises(AudioError, match=message):
        (read_duration(audio), read_audio(audio, 16000))


def test_a_wav_whose_header_does_not_know_its_size_is_read(clips):
    encoded = bytearray(wav_bytes(clips[0]))
    place = encoded.index(b"data") + 4
    encoded[place : place + 4] = b"\xff\xff\xff\xff"  # as written into a pipe
    assert len(read_audio({"bytes": bytes(encoded), "path": None}, 16000)) == len(clips[0])


def test_an_mp3_of_constant_bit_rate_needs_no_header(clips):
    num_samples, encoded = headless_mp3(clips[4], "CONSTANT")
    picture = b"ID3\x04\0\0\0\x08\0\0" + bytes(8 << 14)
    audio = {"bytes": picture + encoded + b"TAG" + bytes(125), "path": None}
    assert abs(len(read_audio(audio, 16000)) - num_samples) < 5000
    assert read_duration(audio) == pytest.approx(num_samples / 16000, abs=0.3)
