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
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..cards import describe_licenses
from ..command_line import option, parse_arguments
from ..data import SpeechDataset, load_corpus
from ..data.corpora import column_of
from ..data.dataset import clip_ids, decoded
from ..data.folders import source_name
from ..data.pseudo_labels import DESCRIPTION, SCHEMA, PseudoLabels, recording_key
from ..decoding import DecodingArguments
from ..evaluation.transcription import TranscriptLog, checksum, state_of_file, transcribe
from ..hub import weights_digest
from ..recognizer import ComputingArguments, SpeechRecognizer
from .arguments import ClipArguments

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 100  # of the parquet files
HELP = """Transcribe a corpus without texts by a trained recogniser, for scripts/finetune_ctc.py to learn from beside
the true transcripts: self-training, or pseudo-labelling (Kahn et al. 2020, arXiv 1909.09116; on top of pre-training, Xu
et al. 2021, arXiv 2010.11430).

    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --output_dir runs/teacher
    python scripts/make_pseudo_labels.py --model runs/teacher --corpus my_audio --output_dir runs/pseudo1
    python scripts/finetune_ctc.py --model runs/mine --corpus my_labelled_audio --pseudo_labels runs/pseudo1 \\
      --output_dir runs/student

The student may be the teacher of a second round. The output folder holds parquet files with audio and text of every
clip that could be decoded. Long recordings are cut into equal parts, also within words. The same command goes on where
it was killed; accelerate launch shares the work."""


@dataclass
class PseudoLabelArguments:
    model: str = option("", "Folder or Hub name of a speech recogniser, of this package or any of transformers.")
    trust_remote_code: bool = option(False, "Run the code that comes with a model; those of this package need none.")
    corpus: list[str] = option([], "Sources of audio, as for scripts/pretrain.py.")
    split: str = option("train", "Of the sources.")
    audio_column: str = option("audio", "Column with the audio in parquet files and Hub data sets.")
    output_dir: str = option(
        "runs/pseudo_labels", "Folder for a copy of the clips, at the recogniser's rate, with texts."
    )
    max_seconds_per_batch: float = option(60.0, "Seconds of audio transcribed together, padding included.")

    def __post_init__(self):
        for name in ("model", "corpus"):
            if not getattr(self, name):
                raise ValueError(f"expected --{name}")
        if self.max_seconds_per_batch <= 0:
            raise ValueError(f"max_seconds_per_batch must be positive, found {self.max_seconds_per_batch}")


def open_folder(folder: Path, description: dict) -> PseudoLabels:
    """The folder with what is there of these pseudo-labels already.

    Raises:
        FileExistsError: it holds something else.
    """
    labels = PseudoLabels(folder, description)
    if not folder.exists() or all(path.name == f"{DESCRIPTION}.begun" for path in folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        labels.save_description()
    elif not (folder / DESCRIPTION).is_file():
        raise FileExistsError(f"{folder} holds other files: delete it or give another --output_dir")
    found = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    own, other = description["identity"], found["identity"]
    if changed := [f"{name}={other.get(name)!r}, now {own[name]!r}" for name in own if other.get(name) != own[name]]:
        raise FileExistsError(
            f"{folder} holds texts made with {'; '.join(changed)}: delete it or give another --output_dir"
        )
    return PseudoLabels(folder, found)


def write_clips(dataset: SpeechDataset, texts: list[str | None], clips: list[int], file: Path) -> int:
    """Write audio, as FLAC of 16 bits, and text of the clips that have one into a parquet file; how many there are."""
    clips, rows, written = [clip for clip in clips if texts[clip] is not None], [], 0
    names, recordings = clip_ids(dataset), dataset.corpus["id"][:]
    seconds = column_of(dataset.corpus, "duration").to_pylist()
    begun = file.with_suffix(".begun")
    with pyarrow.parquet.ParquetWriter(begun, SCHEMA) as writer:
        progress = tqdm(decoded(dataset, clips), desc="writing", total=len(clips), unit="clip", mininterval=1)
        for clip, samples in zip(clips, progress):
            if samples is None:
                continue
            stream, row = io.BytesIO(), int(dataset.rows[clip])
            soundfile.write(stream, samples, dataset.sampling_rate, format="FLAC", subtype="PCM_16")
            rows.append(
                {
                    "id": names[clip],
                    "audio": {"bytes": stream.getvalue(), "path": None},
                    "text": texts[clip],
                    "duration": len(samples) / dataset.sampling_rate,
                    "recording": recording_key(recordings[row], seconds[row]),
                }
            )
            written += 1
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA))
    if written:
        begun.replace(file)
    else:
        begun.unlink()
    return written


def main(argv: list[str] | None = None) -> None:
    args, clips, computing, decoding = parse_arguments(
        [PseudoLabelArguments, ClipArguments, ComputingArguments, DecodingArguments], HELP, argv
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("hf_speechcl").setLevel(logging.INFO)
    state = PartialState(cpu=computing.device == "cpu")
    recognizer = SpeechRecognizer.from_pretrained(
        args.model,
        device=state.device if computing.device == "auto" else computing.torch_device,
        dtype=computing.dtype,
        decoding=decoding,
        trust_remote_code=args.trust_remote_code,
    )
    corpus = load_corpus(args.corpus, args.split, args.audio_column)
    of_language_model = [] if decoding.lm is None else state_of_file(Path(decoding.lm))
    description = {
        "identity": {
            "weights": weights_digest(recognizer.model),
            "dtype": computing.dtype,
            "decoding": checksum([vars(decoding), *of_language_model]),
            "clips": checksum([*zip(corpus["id"], corpus["duration"])]),
            **vars(clips),
        },
        "recognizer": source_name(args.model),
        "corpus": [source_name(source) for source in args.corpus],
        "text_policy": getattr(recognizer.model.config, "text_policy", None),
        "sampling_rate": recognizer.sampling_rate,
    }
    folder = Path(args.output_dir)
    with state.main_process_first():
        labels = open_folder(folder, description)
    if labels.is_complete:
        logger.info("%s holds these texts already", source_name(args.output_dir))
        return

    options = {"max_seconds": clips.max_seconds, "min_seconds": clips.min_seconds}
    heard, kept = (
        SpeechDataset(corpus, recognizer.sampling_rate, **options, in_16_bits=in_16_bits)
        for in_16_bits in (False, True)
    )
    log = TranscriptLog(folder / "texts", description["identity"])
    texts = [record["text"] for record in transcribe(recognizer, heard, args.max_seconds_per_batch, log)]
    if not any(texts):
        raise ValueError(f"{source_name(args.model)} wrote nothing of any of {len(texts)} clips: train it for longer")
    own = range(state.process_index, len(texts), state.num_processes)
    file = folder / f"train-{state.process_index:05d}-of-{state.num_processes:05d}.parquet"
    written = sum(gather_object([write_clips(kept, texts, list(own), file)]))
    if state.is_main_process:
        for stale in set(folder.glob("train-*.parquet")) - set(
            folder.glob(f"train-*-of-{state.num_processes:05d}.parquet")
        ):
            stale.unlink()
        licenses = " ".join(describe_licenses(args.corpus, None))
        (folder / "LICENSE.md").write_text(f"Audio of {licenses}\n", encoding="utf-8")
        labels.description.update(clips=written, hours=kept.hours, undecodable=len(texts) - written)
        labels.description.update(empty=texts.count(""))
        labels.save_description()
        print(
            f"{written} of {len(texts)} clips ({kept.hours:.2f} h) are written, {len(texts) - written} could not be "
            f"decoded, {texts.count('')} have an empty text"
        )
    log.remove()
