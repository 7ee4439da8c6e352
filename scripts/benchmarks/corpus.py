#!/usr/bin/env python
"""Start of a training run on corpora of different sizes: seconds and memory, without and with the index of durations.

python scripts/benchmarks/corpus.py --rows 100 10000 1000000

The corpora are made of clips of the embedded one and deleted afterwards: audio files (links, each with a name of its
own) or parquet files (the shorter half of the clips). Every start is that of a training script, in a process of its
own: imports, corpus and validation clips, data sets, sampler, first batch.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.parquet  # noqa: E402
import soundfile  # noqa: E402

from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.data import load_demo  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.data.folders import INDEX_FILE  # noqa: E402
from hf_speechcl.machine import describe_machine  # noqa: E402

FILES_PER_FOLDER, ROWS_PER_FILE, NUM_CLIPS = 1000, 10_000, 200
LAYOUTS = {"files": "Ogg files", "long": "Ogg files, clips joined by tens", "parquet": "parquet files"}
START = """
import json, sys, time
from pathlib import Path
began = time.perf_counter()
from hf_speechcl.data import DurationBatchSampler, SpeechDataset
from hf_speechcl.data.corpora import load_train_and_validation
import hf_speechcl.training.pretrain
def peak():  # of this program alone; ru_maxrss would include the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
marks, imported = [time.perf_counter()], peak()
corpora = load_train_and_validation(sys.argv[1])
marks.append(time.perf_counter())
clips = [SpeechDataset(corpus, 16000, max_seconds=15.0, min_seconds=0.4) for corpus in corpora]
marks.append(time.perf_counter())
sampler = DurationBatchSampler(clips[0].durations, 40.0)
marks.append(time.perf_counter())
samples = [clips[0][key]["input_values"] for key in next(iter(sampler))]
marks.append(time.perf_counter())
print(json.dumps({
    "seconds": [end - start for start, end in zip([began, *marks], marks)], "hours": clips[0].hours + clips[1].hours,
    "imported": imported, "peak": peak(),
}))
"""


@dataclass
class Arguments:
    rows: list[int] = option([100, 10_000, 1_000_000], "Numbers of clips.")
    layouts: list[str] = option(["files"], "What the corpora are: files, long, parquet.")
    repeats: int = option(3, "Starts with the index; the median is printed.")
    folder: str | None = option(None, "Where to make the corpora; a folder for temporary files if not given.")

    def __post_init__(self):
        if unknown := set(self.layouts) - set(LAYOUTS):
            raise ValueError(f"layouts: found {', '.join(unknown)}, expected some of {', '.join(LAYOUTS)}")
        if min(*self.rows, self.repeats) < 1:
            raise ValueError("rows and repeats must be positive")


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    print(describe_machine("datasets", "pyarrow", "soundfile") + "\n")
    print(
        "| corpus | clips | hours | index | imports s | corpus s | data sets s | sampler s | first batch s "
        "| start without imports s | peak MiB | of it imports MiB | index MiB |"
    )
    print("|" + "---|" * 13)
    for layout in args.layouts:
        for num_rows in args.rows:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                corpus = Path(folder, "corpus")
                make_corpus(corpus, layout, num_rows)
                for index, repeats in (("none yet", 1), ("there", args.repeats)):
                    runs = [start(corpus, Path(folder, "cache")) for _ in range(repeats)]
                    seconds = np.array([run["seconds"] for run in runs])
                    whole = seconds[:, 1:].sum(1)
                    spread = f" ({whole.min():.2f} to {whole.max():.2f})" if repeats > 1 else ""
                    print(
                        f"| {LAYOUTS[layout]} | {num_rows:,} | {runs[0]['hours']:,.1f} | {index} | "
                        + " | ".join(f"{value:.2f}" for value in np.median(seconds, axis=0))
                        + f" | {np.median(whole):.2f}{spread} | {max(run['peak'] for run in runs):.0f} | "
                        f"{max(run['imported'] for run in runs):.0f} | "
                        f"{(corpus / INDEX_FILE).stat().st_size / 2**20:.2f} |",
                        flush=True,
                    )


def start(corpus: Path, cache: Path) -> dict:
    """What a start took, in a process of its own."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", START, str(corpus)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def make_corpus(folder: Path, layout: str, num_rows: int) -> None:
    """A folder of clips of the embedded corpus, with as many rows as wanted."""
    audio = load_demo()["train"]["audio"][:]
    folder.mkdir()
    if layout == "parquet":
        audio = sorted(audio, key=lambda clip: len(clip["bytes"]))[:NUM_CLIPS]
        for start in range(0, num_rows, ROWS_PER_FILE):
            rows = range(start, min(start + ROWS_PER_FILE, num_rows))
            clips = [{"bytes": audio[row % NUM_CLIPS]["bytes"], "path": f"{row}.ogg"} for row in rows]
            pyarrow.parquet.write_table(pyarrow.table({"audio": clips}), folder / f"train-{start:07d}.parquet")
        return
    if layout == "long":
        audio = [
            np.concatenate([read_audio(audio[(place + other) % len(audio)], 16000) for other in range(10)])
            for place in range(0, NUM_CLIPS)
        ]
    first: list[Path] = []
    for row in range(num_rows):
        if row % FILES_PER_FOLDER == 0:
            part = folder / f"{row // FILES_PER_FOLDER:05d}"
            part.mkdir()
        file = part / f"{row:07d}.ogg"
        if row >= NUM_CLIPS:
            os.link(first[row % NUM_CLIPS], file)
            continue
        first.append(file)
        if layout == "long":
            soundfile.write(file, audio[row], 16000, subtype="OPUS")
        else:
            file.write_bytes(audio[row]["bytes"])


if __name__ == "__main__":
    main()
