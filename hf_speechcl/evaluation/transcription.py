"""All clips of a data set → their transcripts, by all processes of a launch, going on where a run was cut off."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.batching import DurationBatchSampler
from ..data.dataset import SpeechDataset, clip_ids
from ..recognizer import SpeechRecognizer
from ..recordings import RecordingArguments

logger = logging.getLogger(__name__)

MAX_SNR = 60.0  # dB
FRAMES_AT_ONCE = 10_000  # whose samples are copied, which bounds memory


def estimate_snr(waveform: np.ndarray, sampling_rate: int) -> float:
    """Signal-to-noise ratio of one clip by its own loud and quiet moments, in dB, at most 60.

    The power of frames of 25 ms each 10 ms is sorted: the 10th percentile is taken for noise, and what the 95th has
    above it for speech. So noise is what is heard between words. It ranks clips of speech with pauses; a clip without
    a pause seems noisier than it is, noise that comes and goes with the speech, such as that of coding or clipping, is
    not seen, and digital silence between words makes it 60.

    Args:
        waveform: (S,).
        sampling_rate: in Hz.
    """
    size, hop = round(0.025 * sampling_rate), round(0.010 * sampling_rate)
    if len(waveform) < size:
        waveform = np.pad(waveform, (0, size - len(waveform)))
    frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]
    blocks = (frames[start : start + FRAMES_AT_ONCE] for start in range(0, len(frames), FRAMES_AT_ONCE))
    powers = np.concatenate([np.square(block, dtype=np.float64).mean(1) for block in blocks])
    noise, loud = np.percentile(powers, [10, 95])
    floor = max(loud, 1e-12) * 10 ** (-MAX_SNR / 10)
    return float(min(10 * np.log10(max(loud - noise, floor) / max(noise, floor)), MAX_SNR))


def state_of_file(file: Path) -> tuple[str, int, int]:
    return file.name, file.stat().st_size, file.stat().st_mtime_ns


def checksum(values: Iterable) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:16]


class TranscriptLog:
    """Transcripts made so far, one JSON line each beside the output file, so that an interrupted run can go on.

    Every process writes a file of its own, `OUTPUT_FILE.partial-RANK.jsonl`, and reads those of all. The first line
    says of what model, decoding and corpus the transcripts are.

    Args:
        output_file: of the results.
        identity: what the transcripts depend on, as JSON knows it.
        restart: delete what is there.

    Attributes:
        records: what is there, by the id of the clip.

    Raises:
        ValueError: what is there was made with another identity.
    """

    def __init__(self, output_file: Path, identity: dict, restart: bool = False):
        self.state = PartialState()
        self.output_file = output_file
        if restart:
            remove_partial_transcripts(output_file)
        self.records: dict[str, dict] = {}
        for file in _partial_files(output_file):
            self._read(file, identity)
        self.state.wait_for_everyone()
        self.file = output_file.with_name(f"{output_file.name}.partial-{self.state.process_index}.jsonl")
        self.stream = self.file.open("ab")
        whole = self.file.read_bytes().rfind(b"\n") + 1
        self.stream.truncate(whole)
        if not whole:
            self.stream.write(json.dumps(identity).encode() + b"\n")
            self.stream.flush()

    def _read(self, file: Path, identity: dict) -> None:
        lines = file.read_bytes().rpartition(b"\n")[0].splitlines()  # a last line without end was cut off
        if not lines:
            return
        found = json.loads(lines[0])
        if different := sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name)):
            raise ValueError(
                f"{file.name} holds transcripts of an interrupted run with another {', '.join(different)}: run that "
                "again as it was, choose another output_file, or start anew with --restart True"
            )
        self.records |= {record["id"]: record for record in map(json.loads, lines[1:])}

    def add(self, records: list[dict]) -> None:
        """Write the records of a batch."""
        self.stream.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self.stream.flush()

    def remove(self) -> None:
        """Delete the files of all processes."""
        self.stream.close()
        remove_partial_transcripts(self.output_file)


def remove_partial_transcripts(output_file: Path) -> None:
    """Delete what processes of interrupted runs left beside the output file."""
    state = PartialState()
    state.wait_for_everyone()
    if state.is_main_process:
        for file in _partial_files(output_file):
            file.unlink()
    state.wait_for_everyone()


def _partial_files(output_file: Path) -> list[Path]:
    return sorted(file for file in output_file.parent.iterdir() if file.name.startswith(f"{output_file.name}.partial-"))


def transcribe(
    recognizer: SpeechRecognizer,
    dataset: SpeechDataset,
    max_seconds_per_batch: float = 60.0,
    log: TranscriptLog | None = None,
    recording: RecordingArguments | None = None,
) -> list[dict]:
    """Transcripts of the clips of a data set, the work shared by all processes of a launch.

    Args:
        recognizer: of any kind.
        dataset: at the recogniser's sampling rate, not in 16 bits.
        max_seconds_per_batch: seconds of audio in a batch, padding included. A longer clip, if it is a whole row, is
            transcribed as a recording.
        log: transcripts that are there already, and where to write others.
        recording: how recordings are cut.

    Returns:
        Of every clip `{"id", "text", "snr", "seconds"}`: `clip_ids`, the text as it was decoded, `estimate_snr` in dB,
        and the seconds that computing took, features and decoding included, reading audio not. A clip that cannot be
        decoded, or holds digital silence, is logged and has None for text and snr.
    """
    state = PartialState()
    names = clip_ids(dataset)
    records = {} if log is None else dict(log.records)
    sampler = DurationBatchSampler(
        dataset.durations,
        max_seconds_per_batch,
        shuffle=False,
        rank=state.process_index,
        world_size=state.num_processes,
    )
    left = [[key for key in batch if names[key[1]] not in records] for batch in sampler]
    loader = DataLoader(dataset, batch_sampler=[batch for batch in left if batch], collate_fn=list)
    progress = tqdm(
        total=len(names),
        initial=len(records),
        desc="transcribing",
        unit="clip",
        disable=not state.is_main_process,
    )
    with progress:
        for clips in loader:
            usable = [clip for clip in clips if clip["input_values"] is not None]
            num_samples = sum(len(clip["input_values"]) for clip in usable)
            started = time.perf_counter()
            texts = _texts(recognizer, dataset, usable, max_seconds_per_batch, recording)
            seconds = time.perf_counter() - started
            batch = []
            for clip in clips:
                record = {"id": names[clip["index"]], "text": texts.get(clip["index"]), "snr": None, "seconds": 0.0}
                if clip["input_values"] is not None:
                    record["snr"] = estimate_snr(clip["input_values"], recognizer.sampling_rate)
                    record["seconds"] = seconds * len(clip["input_values"]) / num_samples
                batch.append(record)
            if log is not None:
                log.add(batch)
            records |= {record["id"]: record for record in batch}
            progress.update(len(clips) * state.num_processes)
    records = dict(gather_object(list(records.items())))
    return [records[name] for name in names]


def _texts(
    recognizer: SpeechRecognizer,
    dataset: SpeechDataset,
    clips: list[dict],
    limit: float,
    recording: RecordingArguments | None,
) -> dict[int, str]:
    """Transcripts of the clips of a batch by their index."""
    longest = limit * recognizer.sampling_rate
    short = [clip for clip in clips if len(clip["input_values"]) <= longest or not dataset.whole[clip["index"]]]
    transcripts = recognizer.transcribe([clip["input_values"] for clip in short]) if short else []
    texts = {clip["index"]: transcript.text for clip, transcript in zip(short, transcripts)}
    for clip in clips:
        if clip["index"] not in texts:
            row = dataset.corpus[int(dataset.rows[clip["index"]])]
            texts[clip["index"]] = recognizer.transcribe_recording(row["audio"], recording).text
    return texts
