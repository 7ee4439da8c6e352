#!/usr/bin/env python
"""What an n-gram of training texts is worth to a CTC model: word error rates of greedy decoding, of beam search, and of
beam search with the n-gram, whose weights are chosen on validation clips.

    python scripts/benchmarks/language_model.py --model runs/ctc --corpus queen_en prompts_en
"""

import itertools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Python puts this folder on its path, where evaluate.py would hide the package evaluate.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

from tqdm.auto import tqdm  # noqa: E402

from hf_speechcl.command_line import option, parse_arguments  # noqa: E402
from hf_speechcl.data import load_corpus  # noqa: E402
from hf_speechcl.data.audio import read_audio  # noqa: E402
from hf_speechcl.decoding import DecodingArguments, build_decoder  # noqa: E402
from hf_speechcl.evaluation.asr import SpeechErrorRates  # noqa: E402
from hf_speechcl.language_model import estimate  # noqa: E402
from hf_speechcl.recognizer import SpeechRecognizer  # noqa: E402
from hf_speechcl.text import normalize_text  # noqa: E402
from hf_speechcl.text_policy import TextPolicy  # noqa: E402


@dataclass
class Arguments:
    model: str = option("runs/ctc", "Folder or Hub name of a CTC model.")
    corpus: list[str] = option(["demo"], "Sources with the splits train, validation and test.")
    order: int = option(3, "Of the n-gram.")
    beam_width: int = option(100, "Of the beam search that is scored.")
    lm_weights: list[float] = option([0.25, 0.5, 0.75, 1.0], "To choose from.")
    word_bonuses: list[float] = option([0.0, 1.0, 2.0], "To choose from.")
    max_tuning_clips: int = option(100, "Validation clips of each source that the choice is made on.")
    device: str = option("auto", "cpu, or auto for the accelerator where there is one.")


def main() -> None:
    (args,) = parse_arguments([Arguments], __doc__)
    recognizer = SpeechRecognizer.from_pretrained(args.model, device=args.device)
    texts = {split: [load_corpus(source, split) for source in args.corpus] for split in ("train", "validation", "test")}
    policy = TextPolicy(**(getattr(recognizer.model.config, "text_policy", None) or {}))
    held_out = {
        policy(text) for split in ("validation", "test") for part in texts[split] for text in part["text"] if text
    }
    train = [text for part in texts["train"] for text in part["text"] if text and policy(text)]
    usable = [policy(text) for text in train if not policy.leaves_out(text)]
    kept = [text.split() for text in usable if text not in held_out]
    print(
        f"n-gram of {len(kept)} of {len(train)} training texts ({policy}): {len(train) - len(usable)} are left out for "
        f"their digits, {len(usable) - len(kept)} as they are texts of validation or test too"
    )
    with tempfile.TemporaryDirectory() as folder:
        lm = str(Path(folder, "lm.arpa"))
        estimate(kept, args.order).save(lm)
        tuning = [_posteriors(recognizer, part, args.max_tuning_clips) for part in texts["validation"]]
        grid = {}
        for weight, bonus in itertools.product(args.lm_weights, args.word_bonuses):
            options = DecodingArguments(beam_width=30, lm=lm, lm_weight=weight, word_bonus=bonus)
            rates = [_score(recognizer, clips, options)["wer"] for clips in tuning]
            grid[weight, bonus] = sum(rates) / len(rates)
            print(f"validation, lm_weight {weight:g}, word_bonus {bonus:g}:", *(f"{rate:.1%}" for rate in rates))
        weight, bonus = min(grid, key=grid.get)
        methods = {
            "greedy": DecodingArguments(),
            f"beam {args.beam_width}": DecodingArguments(beam_width=args.beam_width),
            f"beam {args.beam_width}, {args.order}-gram, lm_weight {weight:g}, word_bonus {bonus:g}": DecodingArguments(
                beam_width=args.beam_width, lm=lm, lm_weight=weight, word_bonus=bonus
            ),
        }
        print("\n| test | clips | decoding | WER [95% interval] | CER |\n|---|---|---|---|---|")
        for source, part in zip(args.corpus, texts["test"]):
            clips = _posteriors(recognizer, part)
            for name, options in methods.items():
                rates = _score(recognizer, clips, options)
                interval = f"{rates['wer']:.1%} [{rates['wer_low']:.1%}, {rates['wer_high']:.1%}]"
                print(f"| {Path(source).name} | {len(clips)} | {name} | {interval} | {rates['cer']:.1%} |", flush=True)


def _posteriors(recognizer, corpus, count=None) -> list:
    """Log-posteriors and reference of the clips that have one, spread over the corpus."""
    rows = [row for row in range(len(corpus)) if normalize_text(corpus[row]["text"] or "")]
    rows = rows[:: -(-len(rows) // count) or 1] if count else rows
    return [
        (
            recognizer.log_probs([read_audio(corpus[row]["audio"], recognizer.sampling_rate)])[0],
            normalize_text(corpus[row]["text"]),
        )
        for row in tqdm(rows, desc="posteriors", disable=None)
    ]


def _score(recognizer, clips, options: DecodingArguments) -> dict:
    decoder = build_decoder(recognizer.tokenizer, recognizer.samples_per_frame / recognizer.sampling_rate, options)
    hypotheses = [normalize_text(decoder.decode(log_probs).text) for log_probs, _ in clips]
    return SpeechErrorRates().compute(predictions=hypotheses, references=[reference for _, reference in clips])


if __name__ == "__main__":
    main()
