"""One clip: encoded bytes or a file → mono samples at the model's rate, float32 or of 16 bits."""

import io
import mmap
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from .mpeg import count_samples

MAX_OGG_PAGE = 65307
FULL_SCALE = 32768  # of 16-bit samples
MAX_PEAK = 8.0  # codecs and resampling overshoot full scale a little; more is another scale
UNKNOWN_SIZE = 0x7FFFF000  # sizes from here on are written by programs that did not know the size when they began
UNKNOWN_FRAMES = 1 << 62  # of libsndfile, for a FLAC header of such programs
MPEG_DELAY = 5000  # samples that encoders put around the sound, and decoders take away


class AudioError(ValueError):
    """A clip that cannot be used. The message says what is wrong with it; the caller knows its name."""


def _open(audio: dict[str, Any]) -> tuple[soundfile.SoundFile, int]:
    """The file, and how many samples of each channel are in it."""
    data, path = audio.get("bytes"), audio.get("path")
    if data is None and path is None:
        raise AudioError("no audio: neither bytes nor a path")
    try:
        size = Path(path).stat().st_size if data is None else len(data)
        if size == 0:
            raise AudioError("empty file")
        file = soundfile.SoundFile(path if data is None else io.BytesIO(data))
        return file, _count_samples(file, data, path)
    except FileNotFoundError:
        raise AudioError("no such file") from None
    except soundfile.LibsndfileError as error:
        raise AudioError(f"not readable as audio: {error.error_string}") from None
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from None
    except TypeError as error:
        raise AudioError(f"not readable as audio: {error}") from None


def _count_samples(file: soundfile.SoundFile, data: bytes | None, path: str | None) -> int:
    """What libsndfile says, unless it would read a part of the file without a word, which is an error: of WAV, AIFF and
    Ogg that end too early, of which the header knows better; of Ogg streams one behind the other; of MP3 whose length
    it guesses from the first frame and the size of the file."""
    if file.frames >= UNKNOWN_FRAMES:
        raise AudioError("its header does not say how long it is: re-encode it")
    if file.format == "OGG":
        first, last = _ogg_ends(data, path)
        page = last.rfind(b"OggS")
        if page < 0 or len(last) < page + 18 or not last[page + 5] & 4:
            raise AudioError("truncated: its last Ogg page does not end the stream")
        if first[14:18] != last[page + 14 : page + 18]:
            raise AudioError("several Ogg streams one behind the other, of which one would be read: re-encode it")
    elif file.subtype == "MPEG_LAYER_III":
        if data is None:
            state = Path(path).stat()
            samples, is_stated = _count_in_file(path, state.st_size, state.st_mtime_ns)
        else:
            samples, is_stated = count_samples(data)
        if samples > file.frames + MPEG_DELAY:
            rate = file.samplerate
            raise AudioError(f"MP3 of {samples / rate:.1f} s, {file.frames / rate:.1f} s would be read: re-encode it")
        return file.frames if is_stated or not samples else min(samples, file.frames)
    elif sizes := re.search(r"^\s*(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE):
        declared, found = map(int, sizes.groups())
        if found < declared < UNKNOWN_SIZE:
            raise AudioError(f"truncated: {found} of {declared} bytes of samples are there")
    return file.frames


@lru_cache(maxsize=1024)
def _count_in_file(path: str, size: int, modified: int) -> tuple[int, bool]:
    """As `count_samples`, once for a file in this state: parts of a long recording are read one by one."""
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return count_samples(data)


def _ogg_ends(data: bytes | None, path: str | None) -> tuple[bytes, bytes]:
    """The first and the last bytes of an Ogg file, with whole pages."""
    if data is not None:
        return data, data[-MAX_OGG_PAGE:]
    with open(path, "rb") as stream:
        first = stream.read(MAX_OGG_PAGE)
        stream.seek(max(0, Path(path).stat().st_size - MAX_OGG_PAGE))
        return first, stream.read()


def read_sampling_rate(audio: dict[str, Any]) -> int:
    """Samples per second of a clip `{"bytes", "path"}` by its header.

    Raises:
        AudioError: not an audio file.
    """
    with _open(audio)[0] as file:
        return file.samplerate


def read_duration(audio: dict[str, Any]) -> float:
    """Seconds of a clip `{"bytes", "path"}` by its header, without decoding it.

    Raises:
        AudioError: not an audio file, or one without samples.
    """
    file, num_samples = _open(audio)
    with file:
        if num_samples <= 0:
            raise AudioError("no samples")
        return num_samples / file.samplerate


def read_audio(
    audio: dict[str, Any], sampling_rate: int, start: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Decode a clip `{"bytes", "path"}`, mix it down to one channel and resample it.

    Args:
        sampling_rate: of the result, in Hz.
        start, duration: the part to read, in seconds; to the end by default.

    Returns:
        (S,) float32 in [-1, 1].

    Raises:
        AudioError: not an audio file, truncated (fewer samples than its header says), not finite, or of a scale of its
            own, as some programs write floating-point files.
    """
    file, num_samples = _open(audio)
    with file:
        rate = file.samplerate
        first = min(round(start * rate), num_samples)
        count = num_samples - first if duration is None else min(round(duration * rate), num_samples - first)
        try:
            file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"cannot be decoded: {error.error_string}") from None
    if len(samples) < count:
        raise AudioError(f"truncated: {len(samples) / rate:.2f} s of {count / rate:.2f} s can be decoded")
    _check_scale(samples)
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return mono if rate == sampling_rate else soxr.resample(mono, rate, sampling_rate)


def _check_scale(samples: np.ndarray) -> None:
    """Refuse samples (S, channels) that are not finite or far from [-1, 1]."""
    peak = max(samples.max(), -samples.min()) if samples.size else 0
    if not np.isfinite(peak):
        raise AudioError("holds samples that are not finite")
    if peak > MAX_PEAK:
        raise AudioError(f"holds samples of up to {peak:.4g}, expected -1 to 1: scale them")


def to_int16(samples: np.ndarray) -> np.ndarray:
    """(S,) float32 in [-1, 1] → (S,) int16, rounded; what lies beyond full scale is cut off."""
    scaled = samples * np.float32(FULL_SCALE)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled).astype(np.int16)


def to_float32(samples: np.ndarray) -> np.ndarray:
    """(S,) int16 → (S,) float32 in [-1, 1), exactly; float32 as it is."""
    return samples / np.float32(FULL_SCALE) if samples.dtype == np.int16 else samples


def stream_audio(audio: dict[str, Any], sampling_rate: int, block_seconds: float = 10.0) -> Iterator[np.ndarray]:
    """As `read_audio`, in blocks of about `block_seconds`, so that the length of a recording costs no memory.

    Raises:
        AudioError: as `read_audio`, at the block where it shows.
    """
    file, num_samples = _open(audio)
    with file:
        rate = file.samplerate
        resampler = None if rate == sampling_rate else soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
        size, done = round(block_seconds * rate), 0
        while True:
            try:
                samples = file.read(size, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise AudioError(f"cannot be decoded: {error.error_string}") from None
            _check_scale(samples)
            done += len(samples)
            is_last = len(samples) < size
            mono = samples.mean(axis=1)
            if resampler is not None:
                mono = resampler.resample_chunk(mono, last=is_last)
            if len(mono):
                yield mono
            if is_last:
                break
        if done < num_samples:
            raise AudioError(f"truncated: {done / rate:.2f} s of {num_samples / rate:.2f} s can be decoded")
