#!/usr/bin/env python
"""What pre-training loses to everything but the model: reading, decoding, batches, the Trainer, logs, checkpoints.

One model takes the same updates on the same batches by a bare loop, which holds the batches in memory, and by the
Trainer of scripts/pretrain.py, in turn; then every part is timed alone, and a command to its first update.

python scripts/benchmarks/data_path.py --corpus demo --bf16
python scripts/benchmarks/data_path.py --corpus ../shared/data/pool --encoder base --updates 6
"""

import copy
import io
import itertools
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import soxr  # noqa: E402
import torch  # noqa: E402
from transformers import PrinterCallback, TrainerCallback  # noqa: E402

from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.data import PretrainingCollator, SpeechDataset  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.data.collators import float_waveforms  # noqa: E402
from hf_speechcl.machine import describe_machine  # noqa: E402
from hf_speechcl.training.arguments import PretrainingDataArguments, PretrainingModelArguments, SpeechTrainingArguments  # noqa: E402
from hf_speechcl.training.pretrain import build_trainer  # noqa: E402
from hf_speechcl.training.pretraining_trainer import PretrainingTrainer  # noqa: E402
from hf_speechcl.training.trainer import EpochDataLoader  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 2  # updates at the start of a run that are not timed


@dataclass
class Arguments:
    corpus: list[str] = option(["demo"], "One or more sources, as for scripts/pretrain.py.")
    encoder: str = option("tiny", "Size of the encoder.")
    encoder_options: list[str] = option([], "Fields of SpeechCLConfig to change.")
    objectives: list[str] = option(["best_rq=1.0"], "Objectives with their weights.")
    max_seconds_per_batch: float = option(40.0, "Seconds of audio in a batch.")
    bf16: bool = option(False, "Autocast to bfloat16.")
    device: str = option("cpu", "cpu, or cuda for the accelerator.")
    threads: int = option(2, "Threads of PyTorch.")
    updates: int = option(10, "Updates of a run.")
    rounds: int = option(5, "Runs of each kind, in turn.")
    checkpoint_updates: int = option(200, "Updates between two checkpoints and validations, for their share.")
    decoded_seconds: float = option(600.0, "Seconds of audio to find the rate of decoding with.")
    command: bool = option(True, "Also time scripts/pretrain.py from its start to its first update.")

    def __post_init__(self):
        if self.updates <= WARM_UP:
            raise ValueError(f"updates must be more than {WARM_UP}, found {self.updates}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive, found {self.rounds}")


class Clock(TrainerCallback):
    """When every update was done."""

    def __init__(self, wait):
        self.wait, self.times = wait, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM_UP, state.max_steps):
            self.wait()
            self.times.append(time.perf_counter())


class Bench:
    """A model, its data, and the ways to train it.

    Args:
        args: of the benchmark.
        folder: for what the Trainer writes.
    """

    def __init__(self, args: Arguments, folder: str):
        self.args = args
        self.training = SpeechTrainingArguments(
            output_dir=folder, use_cpu=args.device == "cpu", bf16=args.bf16, max_steps=args.updates,
            eval_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        first = build_trainer(
            PretrainingModelArguments(
                encoder=args.encoder, encoder_options=args.encoder_options, objectives=args.objectives
            ),
            PretrainingDataArguments(corpus=args.corpus, max_seconds_per_batch=args.max_seconds_per_batch),
            self.training,
        )
        if first.model.comparing:
            raise ValueError(
                f"objectives: {', '.join(first.model.comparing)} compare clips, which the bare loop cannot"
            )
        self.model = copy.deepcopy(first.model).cpu()
        self.train, self.validation, self.collator = first.train_dataset, first.eval_dataset, first.data_collator
        self.keys = self._first_batches(first)
        self.batches = [self.collator([self.train[key] for key in keys]) for keys in self.keys]
        self.wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def _first_batches(self, trainer: PretrainingTrainer) -> list[list[tuple[int, int]]]:
        sampler = trainer.get_train_dataloader().batch_sampler

        def of_epoch(epoch):
            sampler.set_epoch(epoch)
            return list(sampler)

        epochs = (of_epoch(epoch) for epoch in itertools.count())
        return list(itertools.islice(itertools.chain.from_iterable(epochs), self.args.updates))

    def trainer(self) -> PretrainingTrainer:
        return PretrainingTrainer(
            model=copy.deepcopy(self.model), args=self.training, train_dataset=self.train,
            eval_dataset=self.validation, data_collator=self.collator,
            max_seconds_per_batch=self.args.max_seconds_per_batch,
        )  # fmt: skip

    def bare(self) -> float:
        """Seconds of an update by a loop of forward, backward and optimizer, batches held in memory."""
        trainer = self.trainer()
        model, optimizer = trainer.model.train(), trainer.create_optimizer()
        device = self.training.device
        batches = [
            {name: values.to(device) for name, values in float_waveforms(batch).items()} for batch in self.batches
        ]
        for number, batch in enumerate(batches):
            if number == WARM_UP:
                self.wait()
                started = time.perf_counter()
            inputs = {name: values for name, values in batch.items() if name != "num_skipped"}
            with torch.autocast(device.type, torch.bfloat16) if self.args.bf16 else nullcontext():
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        self.wait()
        return (time.perf_counter() - started) / (self.args.updates - WARM_UP)

    def trained(self, keep: str = "nothing", workers: int = 0, thread: bool = False) -> float:
        """Seconds of an update by the Trainer.

        Args:
            keep: "nothing", "clips" that were decoded before, or the "batches" themselves.
            workers: processes that make batches.
            thread: whether a thread makes them.
        """
        self.training.dataloader_num_workers = workers
        trainer = self.trainer()
        self.train.decoded = None
        if keep == "clips":
            self.train.keep_decoded(float("inf"))
            for keys in self.keys:
                for key in keys:
                    self.train[key]
        elif keep == "batches":
            trainer.get_train_dataloader = lambda: EpochDataLoader(
                _Held(self.batches), batch_sampler=_Numbers(len(self.batches)), collate_fn=lambda batches: batches[0]
            )
        clock = Clock(self.wait)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.makes_ahead = thread
        trainer.train()
        started, ended = clock.times
        return (ended - started) / (self.args.updates - WARM_UP)


class _Held(list):
    """Batches in memory as a data set, of hours as the Trainer's log wants them."""

    hours = 0.0


class _Numbers:
    """A batch sampler of one item after the other."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        return ([number] for number in range(self.count))

    def set_epoch(self, epoch: int) -> None:
        pass


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    torch.set_num_threads(args.threads)
    logging.getLogger("hf_speechcl").setLevel(logging.WARNING)
    print(
        f"{describe_machine('transformers', 'accelerate', device=args.device)}; "
        f"{' '.join(args.corpus)}, {args.encoder} {' '.join(args.encoder_options)}, {' '.join(args.objectives)}, "
        f"{'bf16 autocast' if args.bf16 else 'float32'}, {args.device}, {args.max_seconds_per_batch:g} s a batch\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        share_of_bare_step(bench)
        parts_of_an_update(bench)
    rates_of_decoding(bench.train, args.decoded_seconds)
    if args.command:
        first_update(args)


def share_of_bare_step(bench: Bench) -> None:
    """Print how the Trainer's rate compares with the bare loop's, in runs that take turns."""
    kinds = {
        "bare loop, batches in memory": bench.bare,
        "Trainer, batches in memory": lambda: bench.trained("batches"),
        "Trainer, clips decoded before, a thread": lambda: bench.trained("clips", thread=True),
        "Trainer, clips decoded before, no thread": lambda: bench.trained("clips"),
        "Trainer, decoding, a thread": lambda: bench.trained(thread=True),
        "Trainer, decoding, no thread": bench.trained,
        "Trainer, decoding, 1 process": lambda: bench.trained(workers=1),
        "Trainer, decoding, 2 processes": lambda: bench.trained(workers=2),
    }
    rng, bare = np.random.default_rng(0), "bare loop, batches in memory"
    seconds = [{kind: kinds[kind]() for kind in rng.permutation(list(kinds))} for _ in range(bench.args.rounds)]
    audio = sum(bench.train.durations[key[1]] for keys in bench.keys[WARM_UP:] for key in keys)
    audio /= len(bench.keys) - WARM_UP
    print(f"Medians (and quartiles) of {bench.args.rounds} runs of {bench.args.updates} updates, each in turn:\n")
    print("| | ms an update | audio s/s | of the bare loop in the same round |")
    print("|---|---|---|---|")
    for kind in kinds:
        low, middle, high = np.percentile([run[kind] for run in seconds], (25, 50, 75))
        lowest, share, highest = np.percentile([run[bare] / run[kind] for run in seconds], (25, 50, 75))
        print(
            f"| {kind} | {1000 * middle:.1f} ({1000 * low:.1f}-{1000 * high:.1f}) | {audio / middle:.0f} | "
            f"{share:.3f} ({lowest:.3f}-{highest:.3f}) |"
        )
    print(flush=True)
    bench.seconds = float(np.median([run[bare] for run in seconds]))


def parts_of_an_update(bench: Bench) -> None:
    """Print what every part takes alone, on one thread where it is not the model."""
    bench.train.decoded = None
    items, collator = [], bench.collator
    decoding = timed(lambda keys: items.append([bench.train[key] for key in keys]), bench.keys)
    waveforms = PretrainingCollator(collator.frame_length, mask_prob=0.0)
    trainer = bench.trainer()
    trainer.remove_callback(PrinterCallback)
    parts = {
        "rows of the corpus": timed(
            lambda keys: [bench.train.corpus[int(bench.train.rows[key[1]])] for key in keys], bench.keys
        ),
        "decoding, with the rows": decoding,
        "padding": timed(waveforms, items),
        "padding, masks, negatives": timed(collator, items),
        "counting items": timed(lambda batch: bench.model.count_items(batch), bench.batches),
        "to the device, as float32": timed(trainer._prepare_inputs, bench.batches),
    }
    trainer.train()
    logs = timed(lambda _: trainer.summarize(trainer.train_sums), range(5)) / bench.training.logging_steps
    parts["a log line's sums, a share of it"] = logs
    every = bench.args.checkpoint_updates
    parts[f"a checkpoint, a share of it ({every} updates)"] = (
        timed(lambda _: trainer._save_checkpoint(trainer.model, None), range(3)) / every
    )
    trainer.model.train()
    parts[f"a validation of {bench.validation.hours * 60:.1f} min, a share of it ({every} updates)"] = (
        timed(lambda _: trainer.evaluate(), range(2)) / every
    )
    observed = {"front_end": torch.randn(2048, 512), "encoder": torch.randn(2048, bench.model.config.hidden_size)}

    def judge(_):
        trainer.guard.vectors = {stage: [vectors] for stage, vectors in observed.items()}
        trainer.guard.judge({}, 0)

    parts[f"of it the collapse guard ({every} updates)"] = timed(judge, range(3)) / every
    print("| part, alone, one after the other | ms an update | of a bare update |")
    print("|---|---|---|")
    for part, seconds in parts.items():
        print(f"| {part} | {1000 * seconds:.2f} | {seconds / bench.seconds:.1%} |")
    print(flush=True)


def timed(function, inputs) -> float:
    """Median seconds of a call."""
    seconds = []
    for value in inputs:
        started = time.perf_counter()
        function(value)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def rates_of_decoding(dataset: SpeechDataset, seconds: float) -> None:
    """Print hours of audio decoded in a second by one thread and by two, of the corpus and of other formats."""
    order = np.random.default_rng(0).permutation(len(dataset))
    order = order[: np.searchsorted(np.cumsum(dataset.durations[order]), seconds) + 1]
    rows = [dataset.corpus[int(row)]["audio"] for row in dict.fromkeys(dataset.rows[order].tolist())]
    rate = dataset.sampling_rate
    waveforms = [read_audio(row, rate) for row in rows]
    sources = {"the corpus": rows}
    for name, own_rate, options in (
        ("WAV, 16 bits", rate, {"format": "WAV", "subtype": "PCM_16"}),
        ("FLAC, 16 bits", rate, {"format": "FLAC", "subtype": "PCM_16"}),
        ("WAV at 44.1 kHz, resampled", 44100, {"format": "WAV", "subtype": "PCM_16"}),
    ):
        sources[name] = []
        for samples in waveforms:
            file = io.BytesIO()
            soundfile.write(
                file, samples if own_rate == rate else soxr.resample(samples, rate, own_rate), own_rate, **options
            )
            sources[name].append({"bytes": file.getvalue(), "path": None})
    hours = sum(map(len, waveforms)) / rate / 3600
    print("| decoding, hours of audio a second | one thread | two threads |")
    print("|---|---|---|")
    for name, clips in sources.items():
        rates = []
        for threads in (1, 2):
            with ThreadPoolExecutor(threads) as pool:
                started = time.perf_counter()
                list(pool.map(lambda clip: read_audio(clip, rate), clips))
                rates.append(hours / (time.perf_counter() - started))
        print(f"| {name} | {rates[0]:.2f} | {rates[1]:.2f} |")
    print(flush=True)


def first_update(args: Arguments) -> None:
    """Print the seconds of imports, and of scripts/pretrain.py to its first update."""
    print("| from the start of Python | seconds |")
    print("|---|---|")
    python = sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    for name, command in {
        "import torch": [python, "-c", "import torch"],
        "import hf_speechcl": [python, "-c", "import hf_speechcl"],
        "pretrain.py --help": [python, "scripts/pretrain.py", "--help"],
    }.items():
        seconds = timed(
            lambda _, command=command: subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, check=True
            ),
            range(3),
        )
        print(f"| {name} | {seconds:.1f} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python, "scripts/pretrain.py", "--output_dir", folder, "--corpus", *args.corpus, "--encoder", args.encoder,
            *(["--encoder_options", *args.encoder_options] if args.encoder_options else []),
            "--objectives", *args.objectives, "--max_seconds_per_batch", str(args.max_seconds_per_batch),
            "--max_steps", "1000", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True",
            *(["--use_cpu"] if args.device == "cpu" else []), *(["--bf16"] if args.bf16 else []),
        ]  # fmt: skip
        started = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env={**environment, "PYTHONUNBUFFERED": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            for line in process.stdout:
                if "loss" in line:
                    break
            seconds = time.perf_counter() - started
            process.kill()
    print(f"| pretrain.py to its first update | {seconds:.1f} |")


if __name__ == "__main__":
    main()
