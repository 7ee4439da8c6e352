"""Impulse responses of simulated rooms."""

from functools import cache
from threading import Lock

import numpy as np
import pyroomacoustics

NUM_ROOMS = 64
ROOM_SEED = 0
ROOM_SIZE = ((3.0, 3.0, 2.5), (10.0, 8.0, 4.0))  # metres, least and greatest; a store-room to a small hall
ROOM_RT60 = (0.2, 0.6)  # seconds, by Sabine's formula, which has no solution below 0.2 s in the largest room
WALL_DISTANCE = 0.5  # metres, as the next
TALKER_DISTANCE = (0.3, 3.0)
ONE_THREAD = Lock()  # held while pyroomacoustics is set to use one


def simulate_room(sampling_rate: int, rng: np.random.Generator) -> np.ndarray:
    """The impulse response (N,) float32 of a random room, from the direct path, which is 1 and its peak.

    A shoebox with walls of one material, by the image-source method (Allen and Berkley 1979). The talker is moved by
    less than a sample's way, so that the direct path takes a whole number of samples. Rooms where reflections add up
    to more than the direct path are drawn again.
    """
    speed = pyroomacoustics.constants.get("c")
    delay = pyroomacoustics.constants.get("frac_delay_length") // 2
    while True:
        size, rt60 = rng.uniform(*ROOM_SIZE), rng.uniform(*ROOM_RT60)
        microphone, talker = rng.uniform(WALL_DISTANCE, size - WALL_DISTANCE, size=(2, 3))
        distance = np.linalg.norm(talker - microphone)
        if not TALKER_DISTANCE[0] <= distance <= TALKER_DISTANCE[1]:
            continue
        samples = int(distance / speed * sampling_rate)
        talker = microphone + (talker - microphone) * samples * speed / sampling_rate / distance
        absorption, order = pyroomacoustics.inverse_sabine(rt60, size)
        room = pyroomacoustics.ShoeBox(
            size, fs=sampling_rate, materials=pyroomacoustics.Material(absorption), max_order=order
        )
        room.add_source(talker).add_microphone(microphone)
        room.compute_rir()
        rir = room.rir[0][0][delay + samples :]
        if np.abs(room.rir[0][0]).argmax() == delay + samples:
            return (rir / rir[0]).astype(np.float32)


@cache
def room_response(index: int, sampling_rate: int) -> np.ndarray:
    """The impulse response of one of NUM_ROOMS rooms, the same in every process; simulated once in each."""
    with ONE_THREAD:
        threads = pyroomacoustics.constants.get("num_threads")
        pyroomacoustics.constants.set("num_threads", 1)  # sums in another order would differ in their last bits
        try:
            return simulate_room(sampling_rate, np.random.default_rng((ROOM_SEED, index)))
        finally:
            pyroomacoustics.constants.set("num_threads", threads)


def simulate_rooms(sampling_rate: int) -> None:
    """Simulate all rooms now, for the workers of a DataLoader to inherit: some seconds, which each would spend."""
    for index in range(NUM_ROOMS):
        room_response(index, sampling_rate)
