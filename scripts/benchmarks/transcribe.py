#!/usr/bin/env python
"""Hours of audio that CTC models transcribe in an hour: SpeechCL against transformers' Wav2Vec2ForCTC of equal size.

python scripts/benchmarks/transcribe.py --sizes base --seconds 10
python scripts/benchmarks/transcribe.py --sizes tiny --seconds 600 --ways recognizer pipeline

Weights are random. Models of one size have the same hidden size, layers, heads and intermediate size; SpeechCL's front
end is log-mel with two or one convolutions (25 or 50 frames per second), Wav2Vec2's seven convolutions of 512 channels
with layer norm (50 frames per second): another architecture, which a ratio compares as it is. Every model lives in a
process of its own, whose highest memory is reset before each measurement; rounds go through all models in turn.
"""

import ctypes
import gc
import io
import json
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC, pipeline  # noqa: E402

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC  # noqa: E402
from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.configuration_speechcl import SIZES  # noqa: E402
from hf_speechcl.ctc import build_processor  # noqa: E402
from hf_speechcl.data import load_corpus  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.int8 import quantize_linear  # noqa: E402
from hf_speechcl.machine import describe_machine, peak_memory  # noqa: E402
from hf_speechcl.recognizer import SpeechRecognizer, check_dtype, find_device  # noqa: E402

RATE = 16000
PAUSE_SECONDS = 0.7  # between the clips that a recording is joined of
CHUNK = 30 * RATE  # samples; what is longer is read in chunks of so many
STRIDE_SECONDS = 4.0  # of the pipeline's chunks
TEXT = "abcdefghijklmnopqrstuvwxyz '"
WAYS = ("model", "recognizer", "pipeline")
PEER = "Wav2Vec2ForCTC"
FRAME_RATES = {"25": 4, "50": 2}  # frames per second: subsampling factor


@dataclass
class Arguments:
    sizes: list[str] = option(["tiny", "base"], f"Of {', '.join(SIZES)}.")
    frame_rates: list[str] = option([*FRAME_RATES], "Frames per second of SpeechCL: 25, 50.")
    dtypes: list[str] = option(["float32", "bfloat16", "int8"], "Of SpeechCL.")
    peer_dtypes: list[str] = option(["float32", "bfloat16"], f"Of {PEER}; the first is what ratios are to.")
    ways: list[str] = option(
        [*WAYS], "model: waveforms to logits; recognizer: SpeechRecognizer; pipeline: transformers'."
    )
    seconds: list[float] = option(
        [10.0, 600.0], "Lengths of the recordings, of clips of the corpus joined with pauses."
    )
    batch_sizes: list[int] = option([1, 8], "Clips at once; chunks at once, of the pipeline with a long recording.")
    rounds: int = option(3, "Measurements of each; the median is told, with the lowest and the highest.")
    corpus: str = option("demo", "Source of the clips.")
    split: str = option("test", "Its split.")
    device: str = option("cpu", "cpu, cuda …, or auto for the accelerator where there is one.")
    threads: int = option(2, "Of each process on a CPU; one process computes at a time.")
    worker: str | None = option(None, "Serve a model, as JSON says which: for the processes that this script starts.")

    def __post_init__(self):
        device = find_device(self.device)
        for dtype in (*self.dtypes, *self.peer_dtypes):
            check_dtype(dtype, device)
        for name, known in {"sizes": SIZES, "frame_rates": FRAME_RATES, "ways": WAYS}.items():
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ValueError(f"{name} must be of {', '.join(known)}, found {', '.join(unknown)}")
        for name in ("rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("seconds", "batch_sizes"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if not self.peer_dtypes:
            raise ValueError("peer_dtypes must name one at least, which ratios are to")


@dataclass
class Case:
    """What is measured: `batch_size` recordings of `seconds` at once, in one of `WAYS`.

    A recording longer than `CHUNK` comes alone, and `batch_size` of its chunks are read at once.
    """

    way: str
    seconds: float
    batch_size: int

    @property
    def is_long(self) -> bool:
        return self.seconds * RATE > CHUNK

    @property
    def audio_seconds(self) -> float:
        return self.seconds * (1 if self.is_long else self.batch_size)


def build_model(name: str, size: str, frame_rate: str, dtype: str, vocab_size: int):
    """A model of random weights."""
    torch.manual_seed(0)
    if name == PEER:
        same = {field: SIZES[size][field] for field in SIZES[size] if field != "sliding_window"}
        config = Wav2Vec2Config(
            **same, vocab_size=vocab_size, pad_token_id=0, feat_extract_norm="layer", do_stable_layer_norm=True
        )
        model = Wav2Vec2ForCTC(config)
    else:
        config = SpeechCLConfig.from_size(
            size, subsampling_factor=FRAME_RATES[frame_rate], vocab_size=vocab_size, pad_token_id=0
        )
        model = SpeechCLForCTC(config)
    if dtype == "int8":
        quantize_linear(model)
    return model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32).eval()


def join_clips(corpus: str, split: str, seconds: float) -> np.ndarray:
    """Speech with pauses, of exactly that length."""
    rows, parts, length = load_corpus(corpus, split), [], 0
    noise = np.random.default_rng(0).normal(0, 1e-4, round(PAUSE_SECONDS * RATE)).astype(np.float32)
    while length < seconds * RATE:
        parts += [read_audio(rows[len(parts) // 2 % len(rows)]["audio"], RATE), noise]
        length += len(parts[-2]) + len(noise)
    return np.concatenate(parts)[: round(seconds * RATE)]


def serve(args: Arguments) -> None:
    """Measure the cases that come in as lines of JSON; answer with seconds and MiB."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    processor = build_processor([TEXT], RATE)
    model = build_model(**json.loads(args.worker), vocab_size=len(processor.tokenizer)).to(device)
    recognizer = SpeechRecognizer(model, processor.feature_extractor, processor.tokenizer)
    recording = join_clips(args.corpus, args.split, max(args.seconds))
    stock = pipeline(
        "automatic-speech-recognition",
        model=model,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device=device,
    )
    for line in sys.stdin:
        case = Case(**json.loads(line))
        clips = [np.roll(recording, -number * RATE)[: round(case.seconds * RATE)] for number in range(case.batch_size)]
        file = to_flac(clips[0])
        rest = reset_peak(device)
        began = time.perf_counter()
        if case.way == "model":
            parts = list(np.split(clips[0], range(CHUNK, len(clips[0]), CHUNK))) if case.is_long else clips
            for first in range(0, len(parts), case.batch_size):
                run_model(model, parts[first : first + case.batch_size])
        elif case.way == "recognizer" and case.is_long:
            recognizer.transcribe_recording(file)
        elif case.way == "recognizer":
            recognizer.transcribe(clips)
        elif case.is_long:
            stock(clips[0], chunk_length_s=CHUNK / RATE, stride_length_s=STRIDE_SECONDS, batch_size=case.batch_size)
        else:
            stock(clips, batch_size=case.batch_size)
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "peak": peak_memory(device), "rest": rest}), flush=True)


@torch.inference_mode()
def run_model(model, clips: list[np.ndarray]) -> None:
    """Logits of clips; those that are shorter than the first are padded, for the same speed."""
    inputs = np.stack([np.pad(clip, (0, len(clips[0]) - len(clip))) for clip in clips])
    inputs = torch.from_numpy(inputs).to(model.device)
    model(inputs.to(model.dtype) if isinstance(model, Wav2Vec2ForCTC) else inputs).logits.cpu()


def to_flac(samples: np.ndarray) -> dict:
    """A clip as the rows of a corpus have it."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, RATE, format="FLAC")
    return {"bytes": stream.getvalue(), "path": None}


def reset_peak(device: torch.device) -> float:
    """Forget the highest memory so far; what is in use now, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


class Worker:
    """A model in a process of its own."""

    def __init__(self, argv: list[str], **model: str):
        self.label = model
        self.process = subprocess.Popen(
            [sys.executable, __file__, *argv, "--worker", json.dumps(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, case: Case) -> dict:
        self.process.stdin.write(json.dumps(vars(case)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {' '.join(self.label.values())} ended: see above")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def list_models(args: Arguments, size: str) -> list[dict[str, str]]:
    """What `build_model` makes, the peers first."""
    peers = [{"name": PEER, "size": size, "frame_rate": "50", "dtype": dtype} for dtype in args.peer_dtypes]
    return peers + [
        {"name": "SpeechCLForCTC", "size": size, "frame_rate": frame_rate, "dtype": dtype}
        for frame_rate in args.frame_rates
        for dtype in args.dtypes
    ]


def list_cases(args: Arguments) -> list[Case]:
    """All that is measured of each model; the recogniser forms batches of a long recording itself."""
    return [
        case
        for seconds in sorted(args.seconds)
        for way in args.ways
        for batch_size in sorted(args.batch_sizes)
        if not ((case := Case(way, seconds, batch_size)).is_long and way == "recognizer" and batch_size > 1)
    ]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    (args,) = parse_arguments([Arguments], __doc__, argv)
    if args.worker is not None:
        serve(args)
        return
    machine = describe_machine("transformers", device=find_device(args.device), threads=args.threads)
    print(f"{machine}; no dropout; median of {args.rounds} (lowest to highest)", flush=True)
    print(
        "\n| size | way | audio | model | front end | dtype | hours per hour | peak MiB (of the call) | "
        f"× {PEER} {args.peer_dtypes[0]} | × {PEER} in the same dtype |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in args.sizes:
        workers = [Worker(argv, **model) for model in list_models(args, size)]
        for worker in workers:
            worker.measure(Case("model", min(args.seconds), 1))
        for case in list_cases(args):
            rounds = [[worker.measure(case) for worker in workers] for _ in range(args.rounds)]
            print_case(size, case, workers, rounds)
        for worker in workers:
            worker.close()


def print_case(size: str, case: Case, workers: list[Worker], rounds: list[list[dict]]) -> None:
    """A row for each model. Ratios are medians over the rounds, each taken within its round."""
    seconds = np.array([[result["seconds"] for result in results] for results in rounds])  # (rounds, models)
    peaks, rests = (np.array([[result[name] for result in results] for results in rounds]) for name in ("peak", "rest"))
    peers = {worker.label["dtype"]: place for place, worker in enumerate(workers) if worker.label["name"] == PEER}
    audio = f"{case.seconds:g} s" + (
        f", batch {case.batch_size}" if case.way != "recognizer" or not case.is_long else ""
    )
    for place, worker in enumerate(workers):
        label = worker.label
        rates = sorted(case.audio_seconds / seconds[:, place])
        ratios = [
            f"{statistics.median(seconds[:, peer] / seconds[:, place]):.1f}" if peer is not None else "–"
            for peer in (0, peers.get(label["dtype"]))
        ]
        front_end = "7 convolutions" if label["name"] == PEER else "log-mel"
        print(
            f"| {size} | {case.way} | {audio} | {label['name']}, {label['frame_rate']} Hz | {front_end} | "
            f"{label['dtype']} | {statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f}) | "
            f"{peaks[:, place].max():.0f} ({(peaks - rests)[:, place].max():.0f}) | {' | '.join(ratios)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
