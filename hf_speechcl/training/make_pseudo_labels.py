"""Transcribe a corpus by a trained recogniser, for a next one to learn from."""

import io
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import soundfile
from tqdm.auto import tqdm

from ..command_line import option, parse_arguments
from ..data import SpeechDataset, load_corpus
from ..data.audio import to_float32
from ..data.dataset import decoded
from ..data.folders import source_name, without_folders
from ..data.units import clip_names
from ..decoding import DecodingArguments
from ..hub import weights_digest
from ..recognizer import BATCH_SECONDS, ComputingArguments, SpeechRecognizer
from ..recordings import batch_by_length
from .arguments import ClipArguments

logger = logging.getLogger(__name__)

CLIPS_PER_FILE = 500
DESCRIPTION = """Transcribe a corpus without texts by a trained recogniser, for scripts/finetune_ctc.py to learn from
beside the true transcripts: self-training, or pseudo-labelling (Kahn et al. 2020, arXiv 1909.09116; on top of
pre-training, Xu et al. 2021, arXiv 2010.11430).

    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --output_dir runs/teacher
    python scripts/make_pseudo_labels.py --model runs/teacher --corpus my_audio --output_dir runs/pseudo1
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --pseudo_labels runs/pseudo1 \\
      --output_dir runs/student

The student may be the teacher of a second round. The output folder holds parquet files with audio and text of every
clip that could be decoded, and pseudo_labels.json; the same command goes on where it was killed."""


@dataclass
class PseudoLabelArguments:
    model: str = option("", "Folder or Hub name of a speech recogniser, of this package or any of transformers.")
    corpus: list[str] = option([], "Sources of audio, as for scripts/pretrain.py.")
    split: str = option("train", "Of the sources.")
    audio_column: str = option("audio", "Column with the audio in parquet files and Hub data sets.")
    output_dir: str = option("runs/pseudo_labels", "Folder for the clips and their texts.")
    dataloader_num_workers: int = option(0, "Processes that decode audio.")

    def __post_init__(self):
        for name in ("model", "corpus"):
            if not getattr(self, name):
                raise ValueError(f"expected --{name}")


def transcribe(recognizer: SpeechRecognizer, clips: list[np.ndarray], bar: tqdm) -> list[str]:
    """Texts of clips (S,) int16 each, in batches of clips of about a length."""
    texts = [""] * len(clips)
    for batch in batch_by_length([len(clip) for clip in clips], round(BATCH_SECONDS * recognizer.sampling_rate)):
        transcripts = recognizer.transcribe([to_float32(clips[place]) for place in batch])
        for place, transcript in zip(batch, transcripts):
            texts[place] = transcript.text
        bar.update(len(batch))
    return texts


def to_flac(samples: np.ndarray, sampling_rate: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, sampling_rate, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def keep_description(folder: Path, description: dict) -> None:
    """Write what is made here, or see that it is what was begun here before.

    Raises:
        FileExistsError: the folder holds something else.
    """
    file = folder / "pseudo_labels.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in description if found.get(name) != description[name]]
        if changed:
            shown = "; ".join(f"{name}={found.get(name)!r}, now {description[name]!r}" for name in changed)
            raise FileExistsError(f"{folder} holds texts made with {shown}: delete it or give another --output_dir")
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files: delete it or give another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(description, indent=1, ensure_ascii=False), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    args, clips, computing, decoding = parse_arguments(
        [PseudoLabelArguments, ClipArguments, ComputingArguments, DecodingArguments], DESCRIPTION, argv
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("hf_speechcl").setLevel(logging.INFO)
    recognizer = SpeechRecognizer.from_pretrained(
        args.model, device=computing.device, dtype=computing.dtype, decoding=decoding
    )
    options = {"model": args.model, "weights": weights_digest(recognizer.model), "dtype": computing.dtype}
    options |= {name: getattr(args, name) for name in ("corpus", "split", "audio_column")}
    options |= {**vars(clips), **vars(decoding)}
    folder = Path(args.output_dir)
    keep_description(folder, {name: without_folders(value) for name, value in options.items()})

    corpus = load_corpus(args.corpus, args.split, args.audio_column)
    rate = recognizer.sampling_rate
    dataset = SpeechDataset(corpus, rate, max_seconds=clips.max_seconds, min_seconds=clips.min_seconds)
    names = [name if whole else f"{name}@{start:g}" for (name, start), whole in zip(clip_names(dataset), dataset.whole)]
    with tqdm(total=len(dataset), unit="clip", desc="transcribing", mininterval=1) as bar:
        for number, first in enumerate(range(0, len(dataset), CLIPS_PER_FILE)):
            file = folder / f"train-{number:05d}.parquet"
            chosen = range(first, min(first + CLIPS_PER_FILE, len(dataset)))
            if file.is_file():
                bar.update(len(chosen))
            else:
                found = zip(chosen, decoded(dataset, chosen, args.dataloader_num_workers))
                samples = {clip: values for clip, values in found if values is not None}
                table = {
                    "id": [names[clip] for clip in samples],
                    "audio": [{"bytes": to_flac(values, rate), "path": None} for values in samples.values()],
                    "text": transcribe(recognizer, list(samples.values()), bar),
                    "duration": [len(values) / rate for values in samples.values()],
                }
                begun = file.with_suffix(".begun")
                pyarrow.parquet.write_table(pyarrow.table(table), begun, row_group_size=100)
                begun.replace(file)
                bar.update(len(chosen) - len(samples))
    made = pyarrow.parquet.read_table(sorted(folder.glob("*.parquet")), columns=["text", "duration"])
    hours = sum(made["duration"].to_pylist()) / 3600
    empty = sum(not text for text in made["text"].to_pylist())
    print(f"{len(made)} clips ({hours:.2f} h) in {source_name(args.output_dir)}; {empty} of them with an empty text")
