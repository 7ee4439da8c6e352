"""Cluster the frames of a corpus into the units that the objective hubert predicts."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin_min
from tqdm.auto import tqdm

from ..command_line import option, parse_arguments
from ..data import SpeechDataset
from ..data.audio import to_float32
from ..data.corpora import load_train_and_validation
from ..data.dataset import decoded
from ..data.folders import source_name, without_folders
from ..data.units import Units, clip_names, units_table
from ..distributed import leaves_launch
from ..quantizers import perplexity
from ..recognizer import find_device
from .arguments import ClipArguments, SourceArguments
from .unit_features import MFCC, EncoderLayer

logger = logging.getLogger(__name__)

FRAMES_PER_STEP = 5000

DESCRIPTION = """Cluster the frames of a corpus by k-means into units, for the objective hubert of scripts/pretrain.py.

  First units, of MFCCs, and an encoder that predicts them:
    python scripts/make_units.py --corpus my_audio --output_dir runs/units1
    python scripts/pretrain.py --corpus my_audio --objectives hubert --units runs/units1 --output_dir runs/hubert1
  Better units, of a layer of that encoder, and a new encoder that predicts these:
    python scripts/make_units.py --corpus my_audio --features runs/hubert1 --layer 4 --output_dir runs/units2
    python scripts/pretrain.py --corpus my_audio --objectives hubert --units runs/units2 --output_dir runs/hubert2
  With some transcripts, better ones still, of an encoder fine-tuned on these (CTC clustering: Wang et al. 2022, arXiv
  2206.10125), and a new encoder that predicts these:
    python scripts/finetune_ctc.py --corpus my_labelled_audio --model runs/hubert1 --output_dir runs/guide
    python scripts/make_units.py --corpus my_audio --features runs/guide --layer 6 --output_dir runs/units3
    python scripts/pretrain.py --corpus my_audio --objectives hubert --units runs/units3 --output_dir runs/hubert3

Give both scripts the same corpus, splits, max_seconds and min_seconds. Centroids are fitted on the train split alone;
every clip of train and validation gets its units. The output folder holds kmeans.safetensors, units.parquet and
units.json."""


@dataclass
class UnitArguments:
    _argument_group_name = "units"

    output_dir: str = option("runs/units", "Folder for the units.")
    features: str = option("mfcc", "mfcc, or the folder or Hub name of an encoder of the wav2vec 2.0 family.")
    layer: int | None = option(
        None, "Which hidden_states of the encoder; 0 is what enters its first layer. About two thirds up is a start."
    )
    num_units: int = option(100, "Clusters; 100 for MFCCs and 500 for a layer in Hsu et al. 2021.")
    samples_per_unit: int | None = option(
        None, "Samples of a frame of the encoder to be trained, for mfcc: 640 if not given. Encoders have their own."
    )
    sampling_rate: int | None = option(None, "In Hz, for mfcc: 16000 if not given. Encoders have their own.")
    fit_hours: float = option(100.0, "Hours of train, drawn at random, that the centroids are fitted on at most.")
    seed: int = option(0, "Of the clips to fit on, their order and the first centroids.")
    dataloader_num_workers: int = option(0, "Processes that decode audio.")
    device: str = option(
        "auto", "Where an encoder runs: cpu, cuda:1 …, or auto for the accelerator where there is one."
    )

    def __post_init__(self):
        if self.num_units < 2:
            raise ValueError(f"num_units must be at least 2, found {self.num_units}")
        if self.fit_hours <= 0:
            raise ValueError(f"fit_hours must be positive, found {self.fit_hours}")
        if (self.layer is None) != (self.features == "mfcc"):
            raise ValueError("layer says which layer of an encoder: give it with --features ENCODER, and only then")


ARGUMENTS = (UnitArguments, SourceArguments, ClipArguments)


def build_features(args: UnitArguments) -> MFCC | EncoderLayer:
    """What the options ask to cluster; a rate that an encoder does not have is refused."""
    given = {name: getattr(args, name) for name in ("sampling_rate", "samples_per_unit")}
    given = {name: value for name, value in given.items() if value is not None}
    device = find_device(args.device)
    if PartialState(cpu=device.type == "cpu").num_processes > 1:
        raise ValueError("units are made by one process: start the script without accelerate launch or torchrun")
    if args.features == "mfcc":
        return MFCC(**given)
    features = EncoderLayer(args.features, args.layer, device)
    for name, value in given.items():
        if value != getattr(features, name):
            raise ValueError(f"{name}={value}, but {args.features} has {getattr(features, name)}: leave it out")
    return features


def clip_features(features, dataset: SpeechDataset, indices, num_workers: int, label: str) -> Iterator:
    """Features (T, D) of the clips in this order, None for one that could not be decoded."""
    clips = tqdm(decoded(dataset, indices, num_workers), desc=label, total=len(indices), unit="clip", mininterval=1)
    for samples in clips:
        yield None if samples is None else features(torch.from_numpy(to_float32(samples)))


def fit_centroids(features, dataset: SpeechDataset, args: UnitArguments) -> np.ndarray:
    """Centroids (num_units, D) float32 by one pass of mini-batch k-means over clips in random order.

    Memory holds one mini-batch. As in HuBERT's code, no centroid is moved for having few frames.

    Raises:
        ValueError: fewer frames than units.

    Source: Sculley 2010, "Web-scale k-means clustering".
    """
    order = np.random.default_rng(args.seed).permutation(len(dataset))
    hours = np.cumsum(dataset.durations[order]) / 3600
    order = order[: np.searchsorted(hours, args.fit_hours) + 1]
    step = max(FRAMES_PER_STEP, 3 * args.num_units)
    kmeans = MiniBatchKMeans(
        args.num_units, batch_size=step, random_state=args.seed, compute_labels=False, reassignment_ratio=0.0
    )
    waiting, num_frames = [], 0
    for frames in clip_features(features, dataset, order, args.dataloader_num_workers, "fitting"):
        if frames is not None:
            waiting.append(frames)
            num_frames += len(frames)
        if num_frames >= step:
            kmeans.partial_fit(np.concatenate(waiting))
            waiting, num_frames = [], 0
    if not hasattr(kmeans, "cluster_centers_") and num_frames < args.num_units:
        raise ValueError(f"train has {num_frames} frames, too few for num_units={args.num_units}")
    if waiting:
        kmeans.partial_fit(np.concatenate(waiting))
    return kmeans.cluster_centers_


def assign(features, dataset: SpeechDataset, centroids: np.ndarray, num_workers: int, label: str) -> tuple[list, float]:
    """Units of every clip, (T,) int each, and the sum of all frames' squared distances to their centroids."""
    units, inertia = [], 0.0
    for frames in clip_features(features, dataset, range(len(dataset)), num_workers, label):
        if frames is None:
            units.append(np.zeros(0, dtype=np.int32))
        else:
            nearest, distances = pairwise_distances_argmin_min(frames, centroids, metric="sqeuclidean")
            units.append(nearest.astype(np.int32))
            inertia += float(distances.sum())
    return units, inertia


def is_made(folder: Path, options: dict) -> bool:
    """Whether the folder holds units made with these options already.

    Raises:
        FileExistsError: it holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "units.json").is_file():
        raise FileExistsError(f"{folder} holds files but no complete units: delete it or give another --output_dir")
    found = Units.load(folder).description
    changed = [
        f"{name}={found.get(name)!r}, now {options[name]!r}" for name in options if found.get(name) != options[name]
    ]
    if changed:
        raise FileExistsError(
            f"{folder} holds units made with {'; '.join(changed)}: delete it or give another --output_dir"
        )
    return True


@leaves_launch
def main(argv: list[str] | None = None) -> None:
    args, sources, clips = parse_arguments(ARGUMENTS, DESCRIPTION, argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("hf_speechcl").setLevel(logging.INFO)
    features = build_features(args)
    options = {
        **features.source,
        "sampling_rate": features.sampling_rate,
        "samples_per_unit": features.samples_per_unit,
        "num_units": args.num_units,
        "fit_hours": args.fit_hours,
        "seed": args.seed,
        **vars(sources),
        **vars(clips),
    }
    options = {name: without_folders(value) for name, value in options.items()}
    folder = Path(args.output_dir)
    if is_made(folder, options):
        logger.info("%s holds these units already", source_name(args.output_dir))
        return

    train, validation = load_train_and_validation(
        sources.corpus,
        sources.validation_fraction,
        sources.train_split,
        sources.validation_split,
        audio_column=sources.audio_column,
    )
    datasets = {
        split: SpeechDataset(corpus, features.sampling_rate, args.seed, clips.max_seconds, clips.min_seconds)
        for split, corpus in {"train": train, "validation": validation}.items()
    }
    centroids = fit_centroids(features, datasets["train"], args)
    rows, statistics = [], {}
    for split, dataset in datasets.items():
        units, inertia = assign(features, dataset, centroids, args.dataloader_num_workers, split)
        rows += [(split, name, own) for name, own in zip(clip_names(dataset), units)]
        counts = np.bincount(np.concatenate(units), minlength=args.num_units)
        statistics[split] = {
            "clips": len(units),
            "frames": int(counts.sum()),
            "units_in_use": int((counts > 0).sum()),
            "perplexity": round(perplexity(torch.from_numpy(counts)).item(), 2),
            "inertia_per_frame": round(inertia / max(counts.sum(), 1), 4),
        }
        print(f"{split}: " + ", ".join(f"{name} {value}" for name, value in statistics[split].items()))
    description = {**options, "units_hash": Units.hash(options, centroids), "statistics": statistics}
    Units(folder, description, centroids, units_table(rows)).save()
    logger.info("units are in %s", source_name(args.output_dir))
