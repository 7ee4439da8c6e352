#!/usr/bin/env python
"""What a linear probe and ABX find of phones in the layers of encoders: `probe.py --help`."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from hf_speechcl import SpeechCLConfig
from hf_speechcl.command_line import option, parse_arguments
from hf_speechcl.data.folders import source_name
from hf_speechcl.evaluation.probe import SILENCES, PhoneProbe
from hf_speechcl.features import HiddenStates, StackedLogMel
from hf_speechcl.hub import find_model

UNTRAINED = 3  # encoders with random weights, as they differ

DESCRIPTION = """Phone accuracy of a linear probe on frames, and ABX error of phones, for layers of encoders: SpeechCL
folders, or any of the wav2vec 2.0 family; beside those of log-mel frames (as many side by side as the first model makes
a frame of) and of encoders of the first model's architecture with random weights.

  Half of the clips to fit on, half to test on:
    python scripts/benchmarks/probe.py --models runs/a runs/b --corpus phones.parquet --layers 0 2 4 6
  All layers, fitted on one split and tested on another, phones compared between the same neighbours only:
    python scripts/benchmarks/probe.py --models runs/a --corpus my_phones --splits train test --layers all \\
      --max_clips 400 --same_context True

Prints a markdown table. The corpus has a list of phones and a list of their ends in seconds for every clip. Intervals
of ABX are over pairs of phones: they say nothing of other clips or speakers."""


@dataclass
class Arguments:
    models: list[str] = option([], "Folders or Hub names of encoders.")
    corpus: list[str] = option([], "Sources, as for scripts/pretrain.py; parquet or Hub.")
    splits: list[str] = option(["train"], "One split, half of it to test on, or one to fit and one to test on.")
    layers: list[str] = option(["all"], "Which hidden_states; 0 is what enters the first layer. Or all.")
    max_clips: int = option(60, "Clips that are drawn, those to fit and to test on together.")
    max_frames: int = option(6000, "Frames to fit on, and to test on, of the first of these clips.")
    same_context: bool = option(False, "ABX compares phones between the same neighbours only.")
    min_tokens: int = option(5, "ABX leaves out phones that are said less often.")
    max_triples: int = option(20000, "Of ABX, over all pairs of phones.")
    leave_out: list[str] = option(list(SILENCES), "Labels that are no phones.")
    phones_column: str = option("phones", "Column with a list of each clip's phones.")
    phone_ends_column: str = option("phone_ends", "Column with a list of the phones' ends, in seconds.")
    speaker_column: str = option("speaker", "Column with the speaker; a corpus without it counts as one speaker.")
    audio_column: str = option("audio", "Column with the audio.")
    seed: int = option(0, "Of the clips and triples drawn, and the first of the encoders with random weights.")
    device: str = option("cpu", "Where the encoders run.")
    output_file: str | None = option(None, "JSON file for the results.")

    def __post_init__(self):
        for name in ("models", "corpus", "layers"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one")
        if self.layers != ["all"] and not all(layer.isdigit() for layer in self.layers):
            raise ValueError(f"layers: expected numbers, or all, found {' '.join(self.layers)}")


def untrained_like(model: HiddenStates, seed: int) -> HiddenStates:
    """An encoder of the same architecture with random weights."""
    torch.manual_seed(seed)
    encoder = type(model.encoder)(model.encoder.config).eval().to(model.encoder.device)
    return HiddenStates(encoder, model.layers, model.normalize, model.sampling_rate)


def log_mel_like(model: HiddenStates) -> StackedLogMel:
    """Log-mel frames of 10 ms side by side, at the rate of a model; of SpeechCL, those that it sees."""
    if isinstance(model.encoder.config, SpeechCLConfig):
        return StackedLogMel(model.encoder.config)
    rate = model.sampling_rate
    stacked = model.samples_per_frame * 100 // rate
    config = SpeechCLConfig(
        sampling_rate=rate, hop_length=rate // 100, frame_length=rate // 40, subsampling_factor=stacked
    )
    return StackedLogMel(config)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments([Arguments], DESCRIPTION, argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    layers = None if args.layers == ["all"] else [int(layer) for layer in args.layers]
    for name in args.models:  # all of them, before clips are decoded
        find_model(name)
    first = HiddenStates.load(args.models[0], layers, args.device)
    columns = {name: getattr(args, name) for name in vars(args) if name.endswith("_column")}
    options = {
        name: getattr(args, name) for name in ("max_frames", "same_context", "min_tokens", "max_triples", "leave_out")
    }
    probe = PhoneProbe.load(
        args.corpus, args.splits, first.sampling_rate, args.max_clips, columns, args.seed, **options
    )

    results = {"log-mel": {"-": probe.measure(log_mel_like(first))[0]}}
    for seed in range(args.seed, args.seed + UNTRAINED):
        found = probe.measure(untrained_like(first, seed))
        results[f"untrained encoder, seed {seed}"] = dict(zip(map(str, first.layers), found))
    for number, name in enumerate(args.models):
        model = HiddenStates.load(name, layers, args.device) if number else first
        results[name] = dict(zip(map(str, model.layers), probe.measure(model)))

    log_mel = results["log-mel"]["-"]
    print(f"{len(probe.fit)} clips to fit on, {len(probe.test)} to test on, {len(probe.label_of)} phones;", end=" ")
    print(f"ABX of {log_mel['abx_pairs']} pairs of phones, {log_mel['abx_triples']} triples\n")
    print("| | layer | phone accuracy | ABX error, ± 95% interval over pairs |\n|---|---|---|---|")
    print(f"| chance | | {log_mel['majority']:.1%} | 50.0% |")
    for name, rows in results.items():
        for layer, row in rows.items():
            interval = f"{row['abx_error']:.1%} ± {row['abx_interval']:.1%}"
            print(f"| {name} | {layer} | {row['phone_accuracy']:.1%} | {interval} |")
    if args.output_file:
        settings = asdict(args) | {"corpus": [source_name(source) for source in args.corpus]}
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        document = json.dumps({"settings": settings, "results": results}, indent=1, ensure_ascii=False)
        Path(args.output_file).write_text(document, encoding="utf-8")


if __name__ == "__main__":
    main()
