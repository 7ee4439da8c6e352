#!/usr/bin/env python
"""Clips joined to long recordings: how far their transcript is from those of the clips, how fast, in how much memory.

python scripts/benchmarks/long_recordings.py --model runs/ctc --corpus queen_en --split test --minutes 1 10 30
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import jiwer  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402

from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.data import load_corpus  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.machine import peak_memory  # noqa: E402
from hf_speechcl.recognizer import SpeechRecognizer, find_device  # noqa: E402
from hf_speechcl.recordings import RecordingArguments  # noqa: E402

QUIET_SECONDS, QUIET_CLIPS = 0.1, 100  # the quietest part of the first clips fills the pauses


@dataclass
class Arguments:
    model: str = option("runs/ctc", "Folder or Hub name of a recogniser.")
    corpus: str = option("demo", "Source of the clips.")
    split: str = option("test", "Its split.")
    minutes: list[float] = option([1.0, 10.0, 30.0], "Lengths of the recordings; clips come again where they run out.")
    max_seconds: float = option(30.0, "Longer clips are left out, as fine-tuning leaves them out.")
    gap_seconds: float = option(0.7, f"Pause between clips, of the quietest part of the first {QUIET_CLIPS} clips.")
    device: str = option("cpu", "cpu, or auto for the accelerator where there is one.")
    recording: str | None = option(
        None, "A recording to transcribe instead, printing text, seconds and memory as JSON."
    )
    pause_seconds: float = option(0.5, "For that recording.")


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    if args.recording is not None:
        recognizer = SpeechRecognizer.from_pretrained(args.model, device=args.device)
        began = time.perf_counter()
        text = recognizer.transcribe_recording(
            args.recording, RecordingArguments(pause_seconds=args.pause_seconds)
        ).text
        seconds = time.perf_counter() - began
        print(json.dumps({"text": text, "seconds": seconds, "peak": peak_memory(find_device(args.device))}))
        return
    recognizer = SpeechRecognizer.from_pretrained(args.model, device=args.device)
    corpus, rate = load_corpus(args.corpus, args.split), recognizer.sampling_rate
    rows = [row for row, seconds in enumerate(corpus["duration"]) if seconds <= args.max_seconds]
    if not rows:
        sys.exit(f"max_seconds: {args.corpus}, split {args.split}, has no clip of {args.max_seconds:g} s or less")
    corpus = corpus.select(rows)
    first = corpus.select(range(min(len(corpus), QUIET_CLIPS)))
    room_tone = _quietest([read_audio(clip["audio"], rate) for clip in first], rate)
    texts: list[str] = []
    print("| joined | minutes | cut at pauses | words of the clips | differ | real-time factor | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for minutes in args.minutes:
        for kind, gap, on_frames in (
            (f"pauses of {args.gap_seconds:g} s, clips begin at a frame", args.gap_seconds, True),
            (f"pauses of {args.gap_seconds:g} s", args.gap_seconds, False),
            ("without pauses, clips begin at a frame", 0.0, True),
            ("without pauses", 0.0, False),
        ):
            grid = getattr(recognizer, "samples_per_frame", 1) if on_frames else 1
            with tempfile.TemporaryDirectory() as folder:
                file = str(Path(folder, "recording.wav"))
                with soundfile.SoundFile(file, "w", rate, 1, "FLOAT") as recording:
                    count = 0
                    while recording.tell() < minutes * 60 * rate:
                        clip = read_audio(corpus[count % len(corpus)]["audio"], rate)
                        if count == len(texts):
                            texts.append(recognizer.transcribe([clip])[0].text)
                        recording.write(clip)
                        gap_samples = round(gap * rate)
                        gap_samples += -(recording.tell() + gap_samples) % grid
                        recording.write(np.resize(room_tone, gap_samples))
                        count += 1
                seconds = soundfile.info(file).duration
                for pause in (0.5, 0.0):
                    result = _run(args, file, pause)
                    expected = " ".join(text for text in texts[:count] if text)
                    print(
                        f"| {kind} | {seconds / 60:.1f} | "
                        f"{'yes' if pause else 'no'} | {len(expected.split())} | "
                        f"{jiwer.wer(expected, result['text']):.2%} | {result['seconds'] / seconds:.3f} | "
                        f"{result['peak']:.0f} |",
                        flush=True,
                    )


def _run(args: Arguments, file: str, pause: float) -> dict:
    """Transcribe in a process of its own, whose memory is measured."""
    options = ["--model", args.model, "--recording", file, "--pause_seconds", str(pause), "--device", args.device]
    output = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _quietest(clips: list[np.ndarray], rate: int) -> np.ndarray:
    """The quietest part of all clips, forwards and backwards, so that it can be repeated."""
    size = round(QUIET_SECONDS * rate)
    parts = [clip[start : start + size] for clip in clips for start in range(0, len(clip) - size + 1, size // 4)]
    part = min(parts, key=lambda part: float(np.square(part).mean()))
    return np.concatenate([part, part[::-1]])


if __name__ == "__main__":
    main()
