#!/usr/bin/env python
"""Few-shot accuracy of pre-trained encoders on classes they were not trained to tell: `few_shot.py --help`."""

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import concatenate_datasets

from hf_speechcl import SpeechCLConfig, SpeechCLModel, load_corpus
from hf_speechcl.command_line import option, parse_arguments
from hf_speechcl.data.audio import AudioError, read_audio
from hf_speechcl.data.folders import source_name
from hf_speechcl.evaluation.episodes import EpisodeSampler, score_episodes
from hf_speechcl.evaluation.few_shot import PrototypicalClassifier
from hf_speechcl.evaluation.nearest_prototype import NearestPrototype
from hf_speechcl.hub import find_model
from hf_speechcl.objectives.utterance import pool_statistics

logger = logging.getLogger(__name__)

UNTRAINED = 3  # encoders with random weights, as they differ

DESCRIPTION = """N-way K-shot accuracy of SpeechCL models on labelled clips, beside that of encoders of the first
model's architecture with random weights and of plain means of log-mel frames.

  Speakers of two splits:
    python scripts/benchmarks/few_shot.py --models runs/mine --corpus my_audio --splits validation test \\
      --label_column speaker
  Languages, with examples from one source of recordings and queries from the others:
    python scripts/benchmarks/few_shot.py --models runs/mine --corpus pool.parquet --splits train \\
      --label_column language --group_column source

Prints a markdown table. Intervals are over episodes: they say how exact the mean is for these clips and classes, not
how it would be for others; the lowest and the highest set of classes give an idea of that."""


@dataclass
class FewShotArguments:
    models: list[str] = option([], "Folders or Hub names of SpeechCL models.")
    corpus: list[str] = option([], "Sources, as for scripts/pretrain.py.")
    splits: list[str] = option(["test"], "Splits whose clips are taken together.")
    label_column: str = option("speaker", "Column with the class of every clip.")
    group_column: str | None = option(
        None, "Column (speaker, source): examples of a class are of one group, queries of its other groups."
    )
    n_way: int = option(5, "Classes of an episode.")
    k_shot: int = option(5, "Examples of each class.")
    n_query: int = option(15, "Queries of each class, fewer where it has no more.")
    min_clips: int = option(20, "Classes of fewer clips are left out.")
    max_clips: int | None = option(None, "Clips of a class (and group) that are taken at most, drawn at random.")
    min_seconds: float = option(0.5, "Shorter clips are left out.")
    max_seconds: float = option(10.0, "Of longer clips the first so many seconds are taken.")
    episodes: int = option(500, "Episodes, the same for every model.")
    layer: int | None = option(None, "Hidden states of this layer; without, the last.")
    projector: bool = option(False, "Embeddings of the projector that the models were trained to compare clips with.")
    seed: int = option(0, "Of the clips drawn, the episodes and the encoders with random weights.")
    audio_column: str = option("audio", "Column with the audio.")
    output_file: str | None = option(None, "JSON file for the results.")

    def __post_init__(self):
        for name in ("models", "corpus"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give at least one")
        for name in ("n_query", "k_shot", "episodes", "n_way"):
            if getattr(self, name) < (least := 1 + (name in ("episodes", "n_way"))):
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)}")


def load_clips(args: FewShotArguments, sampling_rate: int) -> tuple[list, list[str | None], list[str | None] | None]:
    """Waveforms of all clips, their labels and their groups."""

    def load(column):
        parts = [load_corpus(args.corpus, split, args.audio_column, label_column=column) for split in args.splits]
        return concatenate_datasets(parts)

    corpus = load(args.label_column)
    labels = corpus["label"][:]
    groups = [None] * len(labels) if args.group_column is None else load(args.group_column)["label"][:]
    waveforms, kept, counts = [], [], Counter()
    for row in np.random.default_rng(args.seed).permutation(len(labels)).tolist():
        place, clip = (labels[row], groups[row]), corpus[row]
        if not labels[row] or clip["duration"] < args.min_seconds or counts[place] == args.max_clips:
            continue
        try:
            waveforms.append(read_audio(clip["audio"], sampling_rate, duration=args.max_seconds))
            kept.append(row)
            counts[place] += 1
        except AudioError as error:
            logger.warning("skipped %s: %s", clip["id"], error)
    logger.info("%d of %d clips are taken", len(kept), len(labels))
    return waveforms, [labels[row] for row in kept], args.group_column and [groups[row] for row in kept]


def log_mel_means(model: SpeechCLModel, waveforms: list) -> torch.Tensor:
    """Mean and deviation over time of log-mel frames (N, 2 * num_mel_bins)."""
    frames = [model.log_mel(torch.from_numpy(waveform)[None]) for waveform in waveforms]
    return torch.cat([pool_statistics(clip, torch.tensor([clip.shape[1]])) for clip in frames])


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments([FewShotArguments], DESCRIPTION, argv)
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folders = [find_model(name) for name in args.models]  # all of them, before clips are decoded
    config = SpeechCLConfig.from_pretrained(folders[0])
    waveforms, labels, groups = load_clips(args, config.sampling_rate)
    sampler = EpisodeSampler(labels, args.n_way, args.k_shot, args.n_query, args.min_clips, groups)

    results = {}
    for name, folder in zip(args.models, folders):
        classifier = PrototypicalClassifier(folder, args.layer, args.projector)
        if classifier.sampling_rate != config.sampling_rate:
            raise ValueError(f"{name} takes {classifier.sampling_rate} Hz, {args.models[0]} {config.sampling_rate} Hz")
        results[name] = classifier.prototypes, classifier.embed(waveforms)
    for seed in range(args.seed, args.seed + UNTRAINED):
        torch.manual_seed(seed)
        untrained = PrototypicalClassifier(SpeechCLModel(config), args.layer)
        results[f"untrained encoder, seed {seed}"] = untrained.prototypes, untrained.embed(waveforms)
    statistics, bins = log_mel_means(untrained.model, waveforms), config.num_mel_bins
    for name, vectors in {"log-mel means": statistics[:, :bins], "log-mel means and deviations": statistics}.items():
        results[name] = NearestPrototype("euclidean", 1.0, standardize=False), vectors
    results = {
        name: score_episodes(vectors, rule, sampler, args.episodes, args.seed)
        for name, (rule, vectors) in results.items()
    }

    clips = {label: sum(map(len, parts)) for label, parts in sampler.members.items()}
    print(f"{args.n_way}-way {args.k_shot}-shot, {args.episodes} episodes, {len(clips)} classes:", end=" ")
    print(", ".join(f"{label} {count}" for label, count in clips.items()) + " clips\n")
    print("| | accuracy, ± 95% interval over episodes | lowest to highest set of classes |\n|---|---|---|")
    print(f"| chance | {1 / args.n_way:.1%} | |")
    for name, scores in results.items():
        spread = f"{scores['lowest_set']:.1%} to {scores['highest_set']:.1%}" if scores["class_sets"] > 1 else ""
        print(f"| {name} | {scores['accuracy']:.1%} ± {scores['interval']:.1%} | {spread} |")
    if args.output_file:
        settings = asdict(args) | {"corpus": [source_name(source) for source in args.corpus]}
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        document = {"settings": settings, "chance": 1 / args.n_way, "clips": clips, "results": results}
        Path(args.output_file).write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
