"""Transcribe a corpus by a trained recogniser, for a next one to learn from."""

import io
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import soundfile
from accelerate import PartialState
from tqdm.auto import tqdm

from ..command_line import option, parse_arguments
from ..data import SpeechDataset, load_corpus
from ..data.audio import to_int16
from ..data.dataset import clip_ids, decoded
from ..data.folders import source_name, without_folders
from ..decoding import DecodingArguments
from ..evaluation.transcription import TranscriptLog, transcribe
from ..hub import weights_digest
from ..recognizer import ComputingArguments, SpeechRecognizer
from .arguments import ClipArguments

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 100  # of the parquet file
WRITTEN, TEXTS = "train.parquet", "texts"
AUDIO = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
SCHEMA = pyarrow.schema(
    {"id": pyarrow.string(), "audio": AUDIO, "text": pyarrow.string(), "duration": pyarrow.float64()}
)

DESCRIPTION = """Transcribe a corpus without texts by a trained recogniser, for scripts/finetune_ctc.py to learn from
beside the true transcripts: self-training, or pseudo-labelling (Kahn et al. 2020, arXiv 1909.09116; on top of
pre-training, Xu et al. 2021, arXiv 2010.11430).

    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --output_dir runs/teacher
    python scripts/make_pseudo_labels.py --model runs/teacher --corpus my_audio --output_dir runs/pseudo1
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --pseudo_labels runs/pseudo1 \\
      --output_dir runs/student

The student may be the teacher of a second round. The output folder holds a parquet file with audio and text of every
clip that could be decoded, and pseudo_labels.json. The same command goes on where it was killed; accelerate launch
shares the work."""


@dataclass
class PseudoLabelArguments:
    model: str = option("", "Folder or Hub name of a speech recogniser, of this package or any of transformers.")
    corpus: list[str] = option([], "Sources of audio, as for scripts/pretrain.py.")
    split: str = option("train", "Of the sources.")
    audio_column: str = option("audio", "Column with the audio in parquet files and Hub data sets.")
    output_dir: str = option("runs/pseudo_labels", "Folder for the clips and their texts.")
    max_seconds_per_batch: float = option(60.0, "Seconds of audio transcribed together, padding included.")

    def __post_init__(self):
        for name in ("model", "corpus"):
            if not getattr(self, name):
                raise ValueError(f"expected --{name}")


def is_made(folder: Path, description: dict) -> bool:
    """Whether the folder holds the texts of this description already.

    Raises:
        FileExistsError: it holds something else.
    """
    file = folder / "pseudo_labels.json"
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in description if found.get(name) != description[name]]
        if changed:
            shown = "; ".join(f"{name}={found.get(name)!r}, now {description[name]!r}" for name in changed)
            raise FileExistsError(f"{folder} holds texts made with {shown}: delete it or give another --output_dir")
        return True
    if folder.exists() and any(not path.name.startswith((WRITTEN, TEXTS)) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files: delete it or give another --output_dir")
    return False


def write_clips(dataset: SpeechDataset, texts: list[str | None], file: Path) -> None:
    """Write audio, as FLAC of 16 bits, and text of every clip that has one, into a parquet file."""
    clips = [clip for clip, text in enumerate(texts) if text is not None]
    names, rate = clip_ids(dataset), dataset.sampling_rate
    begun = file.with_name(f"{file.name}.begun")
    with pyarrow.parquet.ParquetWriter(begun, SCHEMA) as writer:
        rows = []
        for clip, samples in zip(clips, tqdm(decoded(dataset, clips), desc="writing", total=len(clips), unit="clip")):
            stream = io.BytesIO()
            soundfile.write(stream, to_int16(samples), rate, format="FLAC", subtype="PCM_16")
            audio = {"bytes": stream.getvalue(), "path": None}
            rows.append({"id": names[clip], "audio": audio, "text": texts[clip], "duration": len(samples) / rate})
            if len(rows) == ROWS_PER_GROUP or clip == clips[-1]:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
    begun.replace(file)


def main(argv: list[str] | None = None) -> None:
    args, clips, computing, decoding = parse_arguments(
        [PseudoLabelArguments, ClipArguments, ComputingArguments, DecodingArguments], DESCRIPTION, argv
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("hf_speechcl").setLevel(logging.INFO)
    state = PartialState(cpu=computing.device == "cpu")
    recognizer = SpeechRecognizer.from_pretrained(
        args.model,
        device=state.device if computing.device == "auto" else computing.torch_device,
        dtype=computing.dtype,
        decoding=decoding,
    )
    options = {"model": args.model, "weights": weights_digest(recognizer.model), "dtype": computing.dtype}
    options |= {name: getattr(args, name) for name in ("corpus", "split", "audio_column")}
    options |= {**vars(clips), **vars(decoding)}
    description = {name: without_folders(value) for name, value in options.items()}
    folder = Path(args.output_dir)
    if is_made(folder, description):
        logger.info("%s holds these texts already", source_name(args.output_dir))
        return

    corpus = load_corpus(args.corpus, args.split, args.audio_column)
    dataset = SpeechDataset(
        corpus, recognizer.sampling_rate, max_seconds=clips.max_seconds, min_seconds=clips.min_seconds, in_16_bits=False
    )
    folder.mkdir(parents=True, exist_ok=True)
    log = TranscriptLog(folder / TEXTS, description)
    records = transcribe(recognizer, dataset, max(args.max_seconds_per_batch, clips.max_seconds), log)
    if state.is_main_process:
        texts = [record["text"] for record in records]
        write_clips(dataset, texts, folder / WRITTEN)
        text = json.dumps(description, indent=1, ensure_ascii=False)
        (folder / "pseudo_labels.json").write_text(text, encoding="utf-8")
        print(
            f"{len(texts)} clips ({dataset.hours:.2f} h): {texts.count(None)} could not be decoded, "
            f"{texts.count('')} have an empty text"
        )
    log.remove()
