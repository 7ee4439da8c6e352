"""Transcribe a corpus by a trained recogniser, for a next one to learn from."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from ..cards import describe_licenses
from ..command_line import option, parse_arguments
from ..data import SpeechDataset, load_corpus
from ..data.folders import source_name
from ..data.pseudo_labels import PseudoLabels, write_clips
from ..decoding import DecodingArguments
from ..distributed import leaves_launch
from ..evaluation.transcription import (
    TranscriptLog,
    checksum,
    remove_partial_transcripts,
    state_of_file,
    transcribe,
)
from ..hub import weights_digest
from ..recognizer import ComputingArguments, SpeechRecognizer
from .arguments import ClipArguments

logger = logging.getLogger(__name__)

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


@leaves_launch
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
            "clips": checksum([args.audio_column, *zip(corpus["id"], corpus["duration"])]),
            "max_seconds_per_batch": args.max_seconds_per_batch,
            **vars(clips),
        },
        "recognizer": source_name(args.model),
        "corpus": [source_name(source) for source in args.corpus],
        "text_policy": getattr(recognizer.model.config, "text_policy", None),
        "sampling_rate": recognizer.sampling_rate,
    }
    folder = Path(args.output_dir)
    with state.main_process_first():
        labels = PseudoLabels.open(folder, description)
    if labels.is_complete and not labels.num_missing:
        remove_partial_transcripts(folder / "texts")  # of a run killed between its end and this
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
    seconds = gather_object(write_clips(kept, texts, list(own), file))
    written, hours = len(seconds), sum(seconds) / 3600
    if state.is_main_process:
        for stale in set(folder.glob("train-*")) - set(folder.glob(f"train-*-of-{state.num_processes:05d}.parquet")):
            stale.unlink()
        licenses = " ".join(describe_licenses(args.corpus, None))
        (folder / "LICENSE.md").write_text(f"Audio of {licenses}\n", encoding="utf-8")
        labels.description.update(clips=written, hours=hours, undecodable=len(texts) - written)
        labels.description.update(empty=texts.count(""))
        labels.save_description()
        print(
            f"{written} of {len(texts)} clips ({hours:.2f} h) are written, {len(texts) - written} could not be "
            f"decoded, {texts.count('')} have an empty text"
        )
    log.remove()
