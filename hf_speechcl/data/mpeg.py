"""How much sound an MP3 file holds, by the headers of all its frames."""

# By the two bits of the version: MPEG 1, 2 and 2.5.
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # Hz
KILOBITS = {
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}  # a second, whether it is MPEG 1
LAYER_III = 1
LENGTHS = (b"Xing", b"Info", b"VBRI")  # of the frame that says how many there are


def count_samples(data) -> tuple[int, bool]:
    """Samples of each channel in all frames of a file of MPEG layer III, those of encoder delay and padding included;
    and whether the file itself says how many there are.

    Decoders guess the length from the first frame where no Xing header says it, and stop there or where that header
    ends; with a variable bit rate, or files put one behind the other, that is a part of what is there.

    Args:
        data: bytes of the whole file, or a map of it.

    Source: frame headers of ISO/IEC 11172-3, 2.4.1.3, and 13818-3; tags of ID3v2.4, 3.1.
    """
    place, samples, is_stated, is_synchronized = 0, 0, False, False
    while 0 <= place < len(data) - 4:
        size, sound = _read_header(int.from_bytes(data[place : place + 4], "big"))
        following = place + size
        if size and (is_synchronized or data[following : following + 1] in (b"\xff", b"")):
            if samples == 0:
                is_stated = any(name in data[place : place + 40] for name in LENGTHS)
            place, samples, is_synchronized = following, samples + sound, True
        elif data[place : place + 3] == b"ID3":
            digits = zip(data[place + 6 : place + 10], (21, 14, 7, 0))
            place += 10 + sum(byte << shift for byte, shift in digits)
        else:
            found = [at for at in (data.find(b"\xff", place + 1), data.find(b"ID3", place + 1)) if at >= 0]
            place, is_synchronized = min(found, default=-1), False
    return samples, is_stated


def _read_header(header: int) -> tuple[int, int]:
    """Bytes and samples of a frame by its first 32 bits; zeros where they begin none."""
    version, layer = header >> 19 & 3, header >> 17 & 3
    kilobits, rate = (header >> 12 & 15) - 1, header >> 10 & 3
    if header >> 21 != 0x7FF or version not in RATES or layer != LAYER_III or rate == 3 or not 0 <= kilobits < 14:
        return 0, 0
    is_first = version == 3
    bits = 1000 * KILOBITS[is_first][kilobits]
    return (144 if is_first else 72) * bits // RATES[version][rate] + (header >> 9 & 1), 1152 if is_first else 576
