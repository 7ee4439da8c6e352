"""Score a speech recogniser on a corpus."""

import json
import logging
import platform
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState

from .. import hub
from ..command_line import option, parse_arguments
from ..data import SpeechDataset, load_corpus
from ..data.columns import OF_EVERY_CORPUS
from ..data.folders import source_name, write_whole
from ..decoding import DecodingArguments
from ..distributed import leaves_launch
from ..recognizer import ComputingArguments, SpeechRecognizer
from ..recordings import RecordingArguments
from ..text import normalize_text
from .asr import MIN_CLIPS_OF_INTERVAL, SpeechErrorRates, align, frequent_errors, score_slices
from .comparison import check_same_clips, compare, read_other_results
from .report import write_report
from .transcription import TranscriptLog, checksum, state_of_file, transcribe

logger = logging.getLogger(__name__)

DESCRIPTION = """Transcribe a corpus with any model for pipeline("automatic-speech-recognition"), CTC or speech-to-text,
and score the result: word and character error rate with bootstrap 95% intervals, by slices, and a report to look at.

    python scripts/evaluate.py --model runs/ctc --corpus demo --split test
    python scripts/evaluate.py --model runs/ctc --corpus my_labelled_audio --split test --output_file results.json \\
        --report_file report.html
    python scripts/evaluate.py --model openai/whisper-tiny --corpus my_labelled_audio --split test \\
        --text_normalization whisper_english --output_file whisper.json --compare_with results.json"""

FILES_OF_MODELS = ("*.safetensors", "*.py", "*config.json", "vocab.json", "tokenizer.json", "*.txt", "*.model")
USUAL_SLICES = ("speaker", "source", "language")


@dataclass
class EvaluationArguments:
    model: str = option("runs/ctc", "Folder of a model with its processor, or user/name[@revision] on the Hub.")
    corpus: list[str] = option(["demo"], "Sources, as for scripts/pretrain.py.")
    split: str = option("test", "Split to score.")
    audio_column: str = option("audio", "Column with the audio.")
    text_column: str = option("text", "Column with the transcript.")
    text_normalization: str = option(
        "basic", "Applied to references and transcripts: basic, whisper_english (extra `eval`) or none."
    )
    slice_columns: list[str] | None = option(
        None, "Columns to score clips by; without, speaker, source and language where they tell clips apart."
    )
    compare_with: str | None = option(
        None, "output_file of another model on the same clips: the difference, with its interval."
    )
    max_seconds_per_batch: float = option(60.0, "Seconds of audio in a batch; longer clips are read as recordings.")
    trust_remote_code: bool = option(False, "Run the code that comes with a model from the Hub.")
    output_file: str | None = option(
        None, "JSON file for the scores and all transcripts; an interrupted run with the same one goes on."
    )
    report_file: str | None = option(None, "HTML file for a report, with the worst clips to listen to.")
    restart: bool = option(False, "Forget the transcripts of an interrupted run.")
    add_to_card: bool = option(False, "Write the scores into the card in the model's folder.")

    def __post_init__(self):
        normalize_text("", self.text_normalization)
        if self.max_seconds_per_batch <= 0:
            raise ValueError(f"max_seconds_per_batch must be positive, found {self.max_seconds_per_batch}")
        if self.add_to_card and not Path(self.model, "README.md").is_file():
            raise ValueError(f"add_to_card: there is no README.md in a folder {self.model!r}, expected a model's card")
        if self.restart and self.output_file is None:
            raise ValueError("restart: without output_file nothing is left of an interrupted run: leave it out")
        for name in ("output_file", "report_file"):
            if (file := getattr(self, name)) and Path(file).is_dir():
                raise ValueError(f"{name}: {file} is a folder, expected the name of a file")
        if (
            self.output_file
            and self.report_file
            and Path(self.output_file).resolve() == Path(self.report_file).resolve()
        ):
            raise ValueError(f"report_file: {self.report_file} is the output_file too: give another name")
        if self.output_file and Path(self.output_file).is_file():
            _check_overwritten(Path(self.output_file), self.compare_with)


def _check_overwritten(file: Path, compare_with: str | None) -> None:
    """Refuse to write over what is no file of this script, and over what is compared with."""
    if compare_with and Path(compare_with).is_file() and file.samefile(compare_with):
        raise ValueError(f"output_file: {file} is what compare_with reads: give another name")
    try:
        found = json.loads(file.read_text(encoding="utf-8") or '{"transcripts": []}')
    except ValueError:
        found = None
    if not isinstance(found, dict) or "transcripts" not in found:
        raise ValueError(f"output_file: {file} is not of an evaluation, and is left as it is: give another name")


def run_identity(
    args: EvaluationArguments,
    folder: str,
    device_type: str,
    dtype: str,
    decoding: DecodingArguments,
    recording: RecordingArguments,
    corpus: datasets.Dataset,
) -> dict:
    """What the transcripts of a run depend on: two runs with the same may share them."""
    files = [] if decoding.lm is None else [Path(decoding.lm)]
    model = {file for pattern in FILES_OF_MODELS for file in Path(folder).glob(pattern)}
    return {
        "model": source_name(args.model),
        "weights": checksum(map(state_of_file, sorted(model))),
        "device": device_type,
        "dtype": dtype,
        "decoding": checksum([vars(decoding), vars(recording), *map(state_of_file, files)]),
        "max_seconds_per_batch": args.max_seconds_per_batch,
        "corpus": checksum([args.audio_column, *zip(corpus["id"], corpus["duration"])]),
    }


def load_clips(args: EvaluationArguments) -> tuple[datasets.Dataset, list[str], int, list[str]]:
    """Clips with a text, which is normalised; the columns to score them by; how many have no text; and which are no
    audio.

    Raises:
        ValueError: no clip has a text, or a column of slice_columns is not there.
    """
    wanted = list(USUAL_SLICES if args.slice_columns is None else args.slice_columns)
    if taken := sorted(set(OF_EVERY_CORPUS) & set(wanted)):
        raise ValueError(f"slice_columns: {', '.join(taken)} is no column to score clips by: leave it out")
    skipped: list[str] = []
    corpus = load_corpus(
        args.corpus,
        args.split,
        args.audio_column,
        args.text_column,
        require_text=True,
        keep_columns=wanted,
        skipped=skipped,
    )
    values = {column: set(corpus[column]) for column in wanted}
    if args.slice_columns and (missing := [column for column in wanted if values[column] == {None}]):
        raise ValueError(f"slice_columns: {', '.join(args.corpus)} has nothing in {', '.join(missing)}: leave it out")
    columns = wanted if args.slice_columns else [column for column in wanted if len(values[column]) > 1]
    texts = [normalize_text(text or "", args.text_normalization) for text in corpus["text"]]
    corpus = corpus.remove_columns("text").add_column("text", texts)
    scored = [row for row, text in enumerate(texts) if text]
    for row in sorted(set(range(len(corpus))) - set(scored)):
        logger.warning("skipped %s: no text to score against", corpus[row]["id"])
    if not scored:
        raise ValueError(f"no clip of {', '.join(args.corpus)} has a text to score against")
    return corpus.select(scored), columns, len(corpus) - len(scored), skipped


def describe_transcripts(corpus: datasets.Dataset, records: list[dict], columns: list[str], method: str) -> list[dict]:
    """What is kept of every clip that could be decoded: its texts, word errors (see `align`) and slices."""
    transcripts = []
    for row, record in zip(corpus.remove_columns("audio"), records):
        if record["text"] is not None:
            hypothesis = normalize_text(record["text"], method)
            errors = [pair for pair in align(row["text"], hypothesis) if pair[0] != pair[1]]
            transcripts.append(
                {"id": row["id"], "reference": row["text"], "hypothesis": hypothesis, "errors": errors}
                | {"duration": row["duration"], "snr": record["snr"], "seconds": record["seconds"]}
                | {"columns": {column: row[column] for column in columns}}
            )
    if not transcripts:
        raise ValueError("no clip could be decoded: see the skipped clips above")
    return transcripts


def score(transcripts: list[dict], columns: list[str]) -> dict:
    """All numbers on one model's transcripts."""
    audio_seconds = sum(clip["duration"] for clip in transcripts)
    rates = SpeechErrorRates().compute(
        predictions=[clip["hypothesis"] for clip in transcripts],
        references=[clip["reference"] for clip in transcripts],
    )
    return {
        "clips": len(transcripts),
        "hours": audio_seconds / 3600,
        **rates,
        "real_time_factor": sum(clip["seconds"] for clip in transcripts) / audio_seconds,
        "slices": score_slices(transcripts, columns),
        "frequent_errors": frequent_errors(pair for clip in transcripts for pair in clip["errors"]),
    }


def print_results(results: dict) -> None:
    """The headline numbers, and what they depend on."""
    for name in ("wer", "cer"):
        low, high = results[f"{name}_low"], results[f"{name}_high"]
        print(f"{name.upper()} {results[name]:.1%}  (95% interval {low:.1%} to {high:.1%})")
    if results["clips"] < MIN_CLIPS_OF_INTERVAL:
        print(f"intervals of fewer than {MIN_CLIPS_OF_INTERVAL} clips are much too narrow")
    print(
        f"{results['clips']} clips ({results['hours']:.2f} h) of {', '.join(results['corpus'])}, {results['split']}; "
        f"normalisation {results['text_normalization']}; decoding {results['decoding']}"
    )
    if results["clips_skipped"]:
        print(f"{len(results['clips_skipped'])} clips cannot be decoded and are not scored")
    factor = results["real_time_factor"]
    print(
        f"real-time factor {factor:.2g}: {1 / factor:.3g} s of audio in a second of computing "
        f"({results['device']}, {results['dtype']})"
    )
    if results["comparison"]:
        for name in ("wer", "cer"):
            pair = results["comparison"][name]
            print(
                f"{name.upper()} minus that of {results['comparison']['model']} ({pair['other']:.1%}): "
                f"{100 * pair['difference']:+.1f} points (95% interval {100 * pair['low']:+.1f} to "
                f"{100 * pair['high']:+.1f}); lower in {pair['share_better']:.1%} of resamples"
            )


@leaves_launch
def main(argv: list[str] | None = None) -> None:
    types = [EvaluationArguments, ComputingArguments, DecodingArguments, RecordingArguments]
    args, computing, decoding, recording = parse_arguments(types, DESCRIPTION, argv)
    if args.add_to_card and computing.dtype != "float32":
        raise ValueError(f"add_to_card: a card holds scores of dtype float32, not of {computing.dtype}: leave it out")
    logging.basicConfig(format="%(levelname)s %(message)s")
    other = read_other_results(args.compare_with, args.text_normalization) if args.compare_with else None
    state = PartialState(cpu=computing.device == "cpu")
    device = state.device if computing.device == "auto" else computing.torch_device
    folder = hub.find_model(args.model)
    for file in filter(None, (args.output_file, args.report_file)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)

    corpus, columns, num_without_text, skipped = load_clips(args)
    if other is not None:
        check_same_clips(other, dict(zip(corpus["id"], corpus["text"])), args.compare_with)
    recognizer = SpeechRecognizer.from_pretrained(
        folder,
        device=device,
        dtype=computing.dtype,
        decoding=decoding,
        trust_remote_code=args.trust_remote_code,
    )
    log = None
    if args.output_file:  # once all that may be refused has been
        identity = run_identity(args, folder, device.type, computing.dtype, decoding, recording, corpus)
        log = TranscriptLog(Path(args.output_file), identity, args.restart)
    dataset = SpeechDataset(corpus, recognizer.sampling_rate, min_seconds=0, in_16_bits=False)
    records = transcribe(recognizer, dataset, args.max_seconds_per_batch, log, recording)
    if state.is_main_process:
        transcripts = describe_transcripts(corpus, records, columns, args.text_normalization)
        results = {
            "model": source_name(args.model),
            "corpus": [source_name(source) for source in args.corpus],
            "split": args.split,
            "text_normalization": args.text_normalization,
            "decoding": str(decoding),
            "dtype": computing.dtype,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
            "clips_without_text": num_without_text,
            "clips_skipped": skipped + [record["id"] for record in records if record["text"] is None],
            **score(transcripts, columns),
        }
        results["comparison"] = None if other is None else compare(transcripts, other)
        results["transcripts"] = transcripts
        print_results(results)
        if args.output_file:
            write_whole(Path(args.output_file).resolve(), json.dumps(results, indent=1, ensure_ascii=False))
        if args.report_file:
            write_report(results, corpus, Path(args.report_file))
        if args.add_to_card:
            hub.add_results(Path(args.model), results)
    if log is not None:
        log.remove()
