#!/usr/bin/env python
"""One update of pre-training: SpeechCL beside transformers' Wav2Vec2ForPreTraining on the same audio, in one run.

  Under three minutes on two idle cores; and the whole table:
    python scripts/benchmarks/pretrain_step.py --quick True
    python scripts/benchmarks/pretrain_step.py
  How time and memory grow with utterances, batches, codebooks and negatives:
    python scripts/benchmarks/pretrain_step.py --growth True --plot_file growth.png
  On a GPU:
    python scripts/benchmarks/pretrain_step.py --device cuda --sizes base large --clips 32 --compile True

Every model lives in a process of its own, which is told when to run, so that they take turns and each has a peak of
memory of its own. A step is forward, backward and AdamW on one batch in memory: no data path, logging or clipping of
gradients. Floating-point operations are those of matrix products, convolutions and attention (two for a multiplication
and an addition), counted by torch: without the Fourier transform of the log-mel, norms, softmax, activations, dropout
and AdamW. SpeechCL sees log-mel frames and the peer learned convolutions of the waveform, so that their rows are
different architectures with encoders of the same width, depth and heads.
"""

import multiprocessing
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils import flop_counter  # noqa: E402
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining  # noqa: E402
from transformers.models.wav2vec2.modeling_wav2vec2 import (  # noqa: E402
    _compute_mask_indices,
    _sample_negative_indices,
)
from transformers.utils import is_flash_attn_2_available  # noqa: E402

from hf_speechcl import OBJECTIVES, SpeechCLConfig, SpeechDataset, load_corpus  # noqa: E402
from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.configuration_speechcl import SIZES  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.machine import describe_machine, peak_memory  # noqa: E402
from hf_speechcl.objectives import UtteranceObjective  # noqa: E402
from hf_speechcl.pretraining import SpeechCLForPreTraining  # noqa: E402
from hf_speechcl.training.arguments import PretrainingDataArguments, parse_config_options  # noqa: E402
from hf_speechcl.training.pretrain import build_collator  # noqa: E402

OURS, PEER, MATMUL = "SpeechCL", "Wav2Vec2ForPreTraining", "matmul"
SAMPLING_RATE = 16000
VIEWED_SECONDS = 2.5  # clips of objectives that compare clips
QUANTILES = (0.1, 0.5, 0.9)
OPTIMIZER = {"lr": 1e-4, "weight_decay": 0.01, "betas": (0.9, 0.98), "fused": True}
# Rows, inner and outer width of the products whose best rate is called the matmul peak.
MATMUL_SHAPES = {
    "cpu": [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (512, 768, 3072)],
    "cuda": [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096), (16384, 1024, 4096)],
}


@dataclass
class Arguments:
    corpus: str = option("demo", "Source of the audio, as for scripts/pretrain.py; its clips are joined and cut.")
    device: str = option("cpu", "cpu or cuda.")
    threads: int | None = option(None, "Threads of a model; None: as torch chooses.")
    sizes: list[str] = option(["tiny", "base"], f"Sizes of the encoder: {', '.join(SIZES)}.")
    frame_rates: list[float] = option([25.0, 50.0], "Encoder frames per second: 12.5, 25 or 50.")
    dtypes: list[str] = option(["float32", "bf16"], "float32, and bf16 for float32 weights under autocast.")
    objectives: list[str] = option(
        ["best_rq", *(name for name in OBJECTIVES if name != "best_rq")],
        "The first is run at all sizes and frame rates, the others at the first of each.",
    )
    attention: list[str] = option(["sdpa"], "Attention of both models: sdpa, eager, flash_attention_2 where installed.")
    peer: bool = option(True, f"Also measure {PEER}.")
    dropout: float = option(0.1, "Dropout of sub-layers and attention weights in both models; they have no other.")
    encoder_options: list[str] = option([], "Fields of SpeechCLConfig to change; the peer follows in those it has.")
    clips: int = option(2, "Clips in a batch.")
    seconds: float = option(10.0, "Seconds of a clip.")
    rounds: int = option(5, "Turns of each model.")
    turn_seconds: float = option(0.5, "Shortest turn; a model steps once at least.")
    compile: bool = option(False, "torch.compile both models, but for objectives that compare clips.")
    quick: bool = option(
        False, "One round, sizes but the first at the first frame rate, objectives but the first in the last dtype."
    )
    growth: bool = option(False, "Measure growth instead, in the last dtype.")
    plot_file: str = option("growth.png", "Where growth is drawn.")

    def __post_init__(self):
        for name, known in (
            ("device", ["cpu", "cuda"]),
            ("sizes", list(SIZES)),
            ("frame_rates", [12.5, 25.0, 50.0]),
            ("dtypes", ["float32", "bf16"]),
            ("objectives", list(OBJECTIVES)),
            ("attention", ["sdpa", "eager", "flash_attention_2"]),
        ):
            values = getattr(self, name)
            values = values if isinstance(values, list) else [values]
            if not values or set(values) - set(known):
                raise ValueError(f"{name}: expected of {', '.join(map(str, known))}, found {values}")
        for name in ("clips", "seconds", "rounds", "turn_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), found {self.dropout}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: cuda was asked for, and torch finds no CUDA device: leave it out for the CPU")
        if "flash_attention_2" in self.attention and not is_flash_attn_2_available():
            raise ValueError("attention: flash_attention_2 needs a GPU and the package flash-attn: leave it out")


@dataclass(frozen=True)
class Job:
    """What one process measures: steps of a model, or a matrix product of a shape.

    `grows` is the value of what grows from job to job, if anything does.
    """

    model: str
    dtype: str
    config: SpeechCLConfig | None = None
    size: str = ""
    clips: int = 0
    clip_seconds: float = 0.0
    shape: tuple[int, int, int] = (0, 0, 0)
    grows: float = 0.0

    @property
    def audio_seconds(self) -> float:
        return self.clips * self.clip_seconds

    @property
    def objective(self) -> str:
        """Its name, with options that are not the default."""
        if self.model == PEER:
            return "wav2vec2"
        ((name, options),) = self.config.objectives.items()
        return ", ".join([name, *(f"{key}={value}" for key, value in options.items() if key.startswith("num_"))])


@dataclass
class Measurement:
    """What came of a job.

    Attributes:
        job: what was measured.
        about: cells of the table that describe the model, by column.
        flops: floating-point operations of a step.
        seconds: of every step after the first.
        baseline_mib, peak_mib: memory before there was a model, and at its highest; of the process or of the GPU.
        error: what ended the process early.
    """

    job: Job
    about: dict[str, str]
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    baseline_mib: float = 0.0
    peak_mib: float = 0.0
    error: str | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    @property
    def rate(self) -> float:
        """Seconds of audio per second."""
        return self.job.audio_seconds / self.median


# In the process of a model


def work(job: Job, args: Arguments, audio: np.ndarray, connection: Connection) -> None:
    """Build what the job names, describe it, run it whenever told to, and tell the peak of memory in the end."""
    try:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        device = torch.device(args.device)
        warm = nn.Linear(8, 8).to(device)  # loads what torch loads with the first step
        warm(torch.ones(8, 8, device=device)).sum().backward()
        baseline = peak_memory(device)
        if job.model == MATMUL:
            step, about, flops = build_matmul(job, device)
        else:
            step, about, flops = build_step(job, args, audio, device)
        connection.send((about, flops, baseline))
        while (at_least := connection.recv()) is not None:
            connection.send(time_steps(step, at_least, device))
        connection.send(peak_memory(device))
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def time_steps(step, at_least: float, device: torch.device) -> list[float]:
    """Seconds of each of as many steps as take `at_least` seconds, one at least."""
    if device.type == "cuda":
        step()  # to get memory back, and the clock of the GPU up
        torch.cuda.synchronize(device)
    seconds: list[float] = []
    while sum(seconds) < at_least or not seconds:
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the other processes
    return seconds


def build_matmul(job: Job, device: torch.device):
    rows, inner, outer = job.shape
    kind = torch.bfloat16 if job.dtype == "bf16" else torch.float32
    factors = [torch.randn(size, inner, device=device).to(kind) for size in (rows, outer)]
    return partial(nn.functional.linear, *factors), {}, 2 * rows * inner * outer


def build_step(job: Job, args: Arguments, audio: np.ndarray, device: torch.device):
    """A step, as a function without arguments; cells that describe it; its floating-point operations."""
    clips = list(audio[: round(job.audio_seconds * SAMPLING_RATE)].reshape(job.clips, -1))
    model, batch, about = (build_peer if job.model == PEER else build_ours)(job, clips, args)
    model.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], **OPTIMIZER)

    def step(forward=model) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == "bf16"):
            loss = forward(**batch).loss
        if job.model == PEER:
            loss = loss / batch["mask_time_indices"].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if job.model == OURS:
            model.after_update()

    with flop_counter.FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        step()
    if args.compile and not (job.model == OURS and model.comparing):
        about["compiled"] = ", compiled"
        step = partial(step, torch.compile(model))
        step()
    return step, about, counter.get_total_flops()


def build_ours(job: Job, clips: list[np.ndarray], args: Arguments):
    config = job.config
    model = SpeechCLForPreTraining(config)
    speech = SpeechDataset(load_corpus(args.corpus), config.sampling_rate)  # to mix in, where inputs are corrupted
    collator = build_collator(model, PretrainingDataArguments(), speech)
    if "hubert" in config.objectives:
        num_units = model.objectives["hubert"].num_units
        collator.units = lambda index, length: np.random.default_rng(index).integers(num_units, size=length)
    batch = collator(
        [
            {"index": number, "label": number, "seed": (0, 0, number), "input_values": clip}
            for number, clip in enumerate(clips)
        ]
    )
    batch.pop("num_skipped")
    num_layers = len(model.speechcl.subsampling.layers)
    window = config.sliding_window
    attention = config._attn_implementation
    if attention == "sdpa" and window is not None:
        attention = "in blocks"
    elif attention == "sdpa" and args.device == "cpu" and config.attention_dropout:
        attention = "in products"
    about = {
        "front end": f"log-mel {config.num_mel_bins}, {num_layers} convolutions of {config.conv_dim}",
        "frames/s": f"{config.sampling_rate / config.inputs_to_logits_ratio:g}",
        "attention": f"{'all frames' if window is None else f'±{window} frames'}, {attention}",
    }
    return model, batch, about


def build_peer(job: Job, clips: list[np.ndarray], args: Arguments):
    """The peer at the size of the job's configuration, with masks and negatives by its own functions."""
    same = job.config
    config = Wav2Vec2Config(
        hidden_size=same.hidden_size,
        num_hidden_layers=same.num_hidden_layers,
        num_attention_heads=same.num_attention_heads,
        intermediate_size=same.intermediate_size,
        hidden_dropout=same.hidden_dropout,
        attention_dropout=same.attention_dropout,
        activation_dropout=same.activation_dropout,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        layerdrop=0.0,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        attn_implementation=same._attn_implementation,
    )
    model = Wav2Vec2ForPreTraining(config)
    drawn = PretrainingDataArguments()
    values = np.stack([(clip - clip.mean()) / np.sqrt(clip.var() + 1e-7) for clip in clips])
    shape = (len(clips), int(model._get_feat_extract_output_lengths(values.shape[1])))
    samples_per_frame = int(np.prod(config.conv_stride))
    frame_rate = SAMPLING_RATE / samples_per_frame
    np.random.seed(0)
    mask = _compute_mask_indices(shape, drawn.mask_prob, round(drawn.mask_span * frame_rate))
    negatives = _sample_negative_indices(shape, config.num_negatives, mask)
    batch = {
        "input_values": torch.from_numpy(values),
        "mask_time_indices": torch.from_numpy(mask),
        "sampled_negative_indices": torch.from_numpy(negatives),
    }
    about = {
        "front end": f"waveform, {len(config.conv_dim)} convolutions of {config.conv_dim[0]}",
        "frames/s": f"{frame_rate:g}",
        "attention": f"all frames, {config._attn_implementation}",
    }
    return model, batch, about


def convolution_backward_flops(gradient, inputs, weight, *args, out_shape=None, **kwargs) -> int:
    """Each gradient that is computed costs what the forward pass costs; torch's own formula ignores groups."""
    wanted = args[-1][:2]
    return sum(wanted) * 2 * int(np.prod(gradient)) * int(np.prod(weight[1:]))


def attention_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def attention_backward_flops(gradient, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)


FLOP_FORMULAS = {
    torch.ops.aten.convolution_backward: convolution_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


# In the process that asks


def measure(jobs: list[Job], args: Arguments, audio: np.ndarray) -> list[Measurement]:
    """Run all jobs in turns, each in a process of its own, which keeps its memory until the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hf_speechcl.training.pretrain", Wav2Vec2ForPreTraining.__module__])
    workers, measurements = [], []
    for job in jobs:
        connection, theirs = context.Pipe()
        process = context.Process(target=work, args=(job, args, audio, theirs), daemon=True)
        process.start()
        theirs.close()
        measurement = Measurement(job, {})
        workers.append((process, connection, measurement))
        measurements.append(measurement)
        if (answer := ask(process, connection, measurement)) is not None:
            measurement.about, measurement.flops, measurement.baseline_mib = answer
    for number in range(args.rounds):
        for process, connection, measurement in workers[:: -1 if number % 2 else 1]:
            if measurement.error is None:
                connection.send(args.turn_seconds)
                measurement.seconds += ask(process, connection, measurement) or []
    for process, connection, measurement in workers:
        if measurement.error is None:
            connection.send(None)
            measurement.peak_mib = ask(process, connection, measurement) or 0.0
        process.join()
    return measurements


def ask(process, connection: Connection, measurement: Measurement):
    """The answer of a process; None and a note where it failed."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        answer = RuntimeError(f"exit code {process.exitcode}" + (", out of memory?" if process.exitcode == -9 else ""))
    if isinstance(answer, Exception):
        measurement.error = str(answer).splitlines()[0]
        print(f"{measurement.job.model} {measurement.job.size}: {measurement.error}", file=sys.stderr)
        return None
    return answer


def read_clips(corpus: Dataset, seconds: float) -> np.ndarray:
    """The clips of the corpus one after the other, from the start again where they run out, cut to `seconds`."""
    joined: list[np.ndarray] = []
    wanted = round(seconds * SAMPLING_RATE)
    while sum(map(len, joined)) < wanted:
        joined.append(read_audio(corpus[len(joined) % len(corpus)]["audio"], SAMPLING_RATE))
    return np.concatenate(joined)[:wanted]


def reading_rate(corpus: Dataset, seconds: float = 600.0) -> float:
    """Seconds of audio that one core decodes and resamples in a second."""
    began = time.perf_counter()
    read_clips(corpus, seconds)
    return seconds / (time.perf_counter() - began)


def config_of(args: Arguments, size: str, frame_rate: float, objective: dict, attention: str) -> SpeechCLConfig:
    hop_length = SpeechCLConfig().hop_length
    factor = round(SAMPLING_RATE / frame_rate / hop_length)
    options = {
        "subsampling_factor": factor,
        "hidden_dropout": args.dropout,
        "attention_dropout": args.dropout,
        "objectives": objective,
        "attn_implementation": attention,
        **parse_config_options(args.encoder_options, "encoder_options"),
    }
    return SpeechCLConfig.from_size(size, **options)


def our_job(
    args: Arguments,
    dtype: str,
    size: str,
    frame_rate: float,
    objective: str,
    attention: str,
    clips: int | None = None,
    seconds: float | None = None,
    **options,
) -> Job:
    clips, seconds = clips or args.clips, seconds or args.seconds
    if issubclass(OBJECTIVES[objective], UtteranceObjective):
        clips, seconds = max(2, round(clips * seconds / VIEWED_SECONDS)), VIEWED_SECONDS
    if objective == "hubert":
        options["samples_per_unit"] = round(SAMPLING_RATE / frame_rate)
    config = config_of(args, size, frame_rate, {objective: {"weight": 1.0, **options}}, attention)
    return Job(OURS, dtype, config, size, clips, seconds)


def matmul_jobs(args: Arguments) -> list[Job]:
    return [Job(MATMUL, dtype, shape=shape) for dtype in args.dtypes for shape in MATMUL_SHAPES[args.device]]


def plan(args: Arguments) -> list[list[Job]]:
    """For each size the jobs that take turns; those of the next size begin when they have ended."""
    first, *others = args.objectives
    groups = []
    for size in args.sizes:
        rates = args.frame_rates[:1] if args.quick and size != args.sizes[0] else args.frame_rates
        jobs = matmul_jobs(args)
        for attention in args.attention:
            for dtype in args.dtypes:
                ours = [our_job(args, dtype, size, rate, first, attention) for rate in rates]
                jobs += ours
                if args.peer:
                    jobs.append(Job(PEER, dtype, ours[0].config, size, args.clips, args.seconds))
        if size == args.sizes[0]:
            dtypes = args.dtypes[-1:] if args.quick else args.dtypes
            jobs += [
                our_job(args, dtype, size, rates[0], name, args.attention[0]) for name in others for dtype in dtypes
            ]
        groups.append(jobs)
    return groups


def plan_growth(args: Arguments) -> dict[str, list[Job]]:
    """What grows, and the jobs that take turns to show it."""
    job = partial(our_job, args, dtype=args.dtypes[-1], frame_rate=args.frame_rates[0], attention=args.attention[0])
    small, first, longest = args.sizes[0], args.objectives[0], 6 * args.seconds
    batch = f"batches of {args.clips * args.seconds:g} s"
    return {
        f"seconds of an utterance, batches of {longest:g} s": [
            replace(job(size=size, objective=first, clips=clips, seconds=longest / clips), grows=longest / clips)
            for size in args.sizes
            for clips in (12, 6, 4, 3, 2, 1)
        ],
        f"seconds of a batch, utterances of {args.seconds:g} s": [
            replace(job(size=size, objective=first, clips=clips), grows=clips * args.seconds)
            for size in args.sizes
            for clips in (1, 2, 4, 8)
        ],
        f"codebooks of best_rq, {batch}": [
            replace(job(size=small, objective="best_rq", num_codebooks=number), grows=number)
            for number in (1, 2, 4, 8, 16, 32)
        ],
        f"negatives of wav2vec2, {batch}": [
            replace(job(size=small, objective="wav2vec2", num_negatives=number), grows=number)
            for number in (10, 50, 100, 200, 400)
        ],
    }


def plot_growth(sweeps: dict[str, list[Measurement]], file: str) -> None:
    """Time above, memory below, a column for each thing that grows, a line for each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), sharex="col", layout="constrained")
    for (name, measurements), (times, memories) in zip(sweeps.items(), axes.T):
        models = [found for found in measurements if found.job.model == OURS and found.seconds]
        for size in dict.fromkeys(found.job.size for found in models):
            points = sorted((found for found in models if found.job.size == size), key=lambda found: found.job.grows)
            values = [found.job.grows for found in points]
            low, middle, high = np.transpose([np.quantile(found.seconds, QUANTILES) for found in points])
            times.plot(values, middle, marker="o", label=size)
            times.fill_between(values, low, high, alpha=0.2)
            memories.plot(values, [found.peak_mib - found.baseline_mib for found in points], marker="o", label=size)
        times.set_title(name, fontsize="small")
        for axis in (times, memories):
            axis.margins(y=0.1)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend()
    axes[0, 0].set_ylabel("seconds of a step")
    axes[1, 0].set_ylabel("peak memory of the step, MiB")
    figure.savefig(file, dpi=120)


def matmul_peaks(measurements: list[Measurement]) -> dict[str, float]:
    """FLOP per second of the fastest shape, by dtype."""
    peaks: dict[str, float] = {}
    for found in measurements:
        if found.job.model == MATMUL and found.seconds:
            peaks[found.job.dtype] = max(found.flops / found.median, peaks.get(found.job.dtype, 0.0))
    return peaks


def significant(value: float) -> str:
    """Three digits, of which whole numbers keep all."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(seconds: list[float]) -> str:
    """Median and, in brackets, the 10th and 90th percentiles, in milliseconds."""
    low, middle, high = (significant(1000 * value) for value in np.quantile(seconds, QUANTILES))
    return f"{middle} ({low}–{high})"


def table(measurements: list[Measurement]) -> list[str]:
    """The lines of a Markdown table of the models, and what their columns refer to."""
    peaks = matmul_peaks(measurements)
    models = [found for found in measurements if found.job.model != MATMUL]
    peers = {
        (found.job.size, found.job.config._attn_implementation, found.job.dtype): found
        for found in models
        if found.job.model == PEER and found.error is None
    }
    rows = []
    for found in models:
        job = found.job
        cells = {"model": job.model, "size": job.size, "objective": job.objective}
        cells |= {name: found.about.get(name, "") for name in ("front end", "frames/s", "attention")}
        cells["dtype"] = ("bf16 autocast" if job.dtype == "bf16" else job.dtype) + found.about.get("compiled", "")
        cells["dropout"] = f"{job.config.hidden_dropout:g}"
        cells["optimizer"] = "fused AdamW"
        cells["clips"] = f"{job.clips} × {job.clip_seconds:g} s"
        cells["step ms: median (p10–p90)"] = found.error or spread(found.seconds)
        if found.error is None:
            cells["audio s per s"] = significant(found.rate)
            for dtype in sorted({dtype for *_, dtype in peers}, reverse=True):
                peer = peers.get((job.size, job.config._attn_implementation, dtype))
                cells[f"× peer {dtype}"] = "" if peer is None else significant(found.rate / peer.rate)
            cells["GFLOP per audio s"] = significant(found.flops / 1e9 / job.audio_seconds)
            cells["of matmul peak"] = f"{found.flops / found.median / peaks[job.dtype]:.0%}"
            cells["peak MiB"] = f"{found.peak_mib:.0f}"
            cells["of it the step's"] = f"{found.peak_mib - found.baseline_mib:.0f}"
        rows.append(cells)
    columns = max(rows, key=len)
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(cells.get(name, '') for name in columns)} |" for cells in rows),
        "",
        "matmul peak: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks.items()),
    ]


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    print(describe_machine("transformers", device=args.device, threads=args.threads) + "\n", flush=True)
    corpus = load_corpus(args.corpus)
    if args.growth:
        sweeps = {}
        for name, jobs in plan_growth(args).items():
            jobs = matmul_jobs(replace(args, dtypes=args.dtypes[-1:])) + jobs
            sweeps[name] = measure(jobs, args, read_clips(corpus, max(job.audio_seconds for job in jobs)))
            print("\n".join([f"{name}:\n", *table(sweeps[name])]) + "\n", flush=True)
        plot_growth(sweeps, args.plot_file)
        return
    if args.quick:
        args.rounds = 1
    groups = plan(args)
    audio = read_clips(corpus, max(job.audio_seconds for jobs in groups for job in jobs))
    measurements = []
    for jobs in groups:
        measurements += (measured := measure(jobs, args, audio))
        print("\n".join(table(measured)) + "\n", flush=True)
    fastest = max((found.rate for found in measurements if found.job.model == OURS and not found.error), default=0.0)
    reading = reading_rate(corpus)
    print(
        f"The fastest row takes {fastest / 3600:.2g} hours of audio per second. One core reads {reading / 3600:.2g} "
        f"hours of {args.corpus} per second, so that the row takes {fastest / reading:.2g} cores for it."
    )


if __name__ == "__main__":
    main()
