"""Score a CTC model on a corpus."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import AutoModelForCTC, AutoProcessor

from ..command_line import option, parse_arguments
from ..data import load_corpus
from ..hub import source_name
from ..text import normalize_text
from .asr import SpeechErrorRates, transcribe

logger = logging.getLogger(__name__)

DESCRIPTION = """Transcribe a corpus with a CTC model and score the result: word and character error rate, with
bootstrap 95% intervals.

    python scripts/evaluate.py --model runs/ctc --corpus demo --split test
    python scripts/evaluate.py --model runs/ctc --corpus my_labelled_audio --split train --output_file results.json"""


@dataclass
class EvaluationArguments:
    model: str = option("runs/ctc", "Folder or Hub name of a CTC model with its processor.")
    corpus: list[str] = option(["demo"], "Sources, as for scripts/pretrain.py.")
    split: str = option("test", "Split to score.")
    audio_column: str = option("audio", "Column with the audio.")
    text_column: str = option("text", "Column with the transcript.")
    text_normalization: str = option("basic", "Applied to references and transcripts: basic or none.")
    max_seconds_per_batch: float = option(60.0, "Seconds of audio in a batch.")
    device: str = option("auto", "cpu, or auto for the accelerator where there is one.")
    trust_remote_code: bool = option(False, "Run the code that comes with a model from the Hub.")
    output_file: str | None = option(None, "JSON file for the scores and all transcripts.")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments([EvaluationArguments], DESCRIPTION, argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    normalize_text("", args.text_normalization)
    state = PartialState(cpu=args.device == "cpu")
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{args.model} has no tokenizer: fine-tune it first (scripts/finetune_ctc.py)")
    if args.output_file:
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCTC.from_pretrained(args.model, trust_remote_code=args.trust_remote_code).to(state.device)

    corpus = load_corpus(args.corpus, args.split, args.audio_column, args.text_column, require_text=True)
    references = [normalize_text(text or "", args.text_normalization) for text in corpus["text"]]
    scored = [row for row, reference in enumerate(references) if reference]
    for row in sorted(set(range(len(corpus))) - set(scored)):
        logger.warning("skipped %s: no text to score against", corpus[row]["id"])
    if not scored:
        raise ValueError(f"no clip of {', '.join(args.corpus)} has a text to score against")
    hypotheses = transcribe(model, processor, corpus.select(scored), args.max_seconds_per_batch)
    clips = [
        {
            "id": corpus[row]["id"],
            "reference": references[row],
            "hypothesis": normalize_text(hypothesis or "", args.text_normalization),
        }
        for row, hypothesis in zip(scored, hypotheses)
    ]
    if not state.is_main_process:
        return
    rates = SpeechErrorRates().compute(
        predictions=[clip["hypothesis"] for clip in clips], references=[clip["reference"] for clip in clips]
    )
    results = {
        "corpus": [source_name(source) for source in args.corpus],
        "split": args.split,
        "clips": len(clips),
        "clips_without_text": len(corpus) - len(clips),
        "text_normalization": args.text_normalization,
        **rates,
    }
    for name in ("wer", "cer"):
        low, high = rates[f"{name}_low"], rates[f"{name}_high"]
        print(f"{name.upper()} {rates[name]:.1%}  (95% interval {low:.1%} to {high:.1%})")
    sources = ", ".join(results["corpus"])
    print(f"{len(clips)} clips of {sources}, {args.split}; normalisation {args.text_normalization}")
    if args.output_file:
        Path(args.output_file).write_text(json.dumps(results | {"transcripts": clips}, indent=1, ensure_ascii=False))
