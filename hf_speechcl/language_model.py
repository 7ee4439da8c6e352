"""Texts → a word n-gram for beam search, as an ARPA file."""

import gzip
import logging
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from .command_line import option, parse_arguments
from .data import load_corpus
from .hub import find_model
from .text_policy import TextPolicy

logger = logging.getLogger(__name__)

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MAX_ORDER = 6  # of kenlm as it comes from PyPI, which reads no unigram models either
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)

DESCRIPTION = """Estimate a word n-gram (interpolated modified Kneser-Ney) from texts, for beam search.

    python scripts/build_lm.py --model runs/ctc --corpus demo --exclude_corpus demo --output_file lm.arpa
    python scripts/build_lm.py --model runs/ctc --text_files book.txt --corpus my_labelled_audio --output_file lm.arpa
    python -m hf_speechcl transcribe runs/ctc speech.wav --beam_width 100 --lm lm.arpa

The words must be spelled as the recogniser writes them: give the model, and what was done to the texts that it was
fine-tuned on (casing, punctuation, digits) is done to these. The text is held in memory; some ten million words are
well."""


@dataclass
class LanguageModelArguments:
    model: str | None = option(
        None, "Recogniser to build it for, a folder or Hub name; without, texts in lower case without punctuation."
    )
    casing: str | None = option(None, "Without model: lower, upper or keep; lower by default.")
    text_files: list[str] = option([], "Text files in UTF-8, a sentence on each line.")
    corpus: list[str] = option([], "Sources as for scripts/finetune_ctc.py, whose texts are taken.")
    split: str = option("train", "Split of the corpus.")
    audio_column: str = option("audio", "Column with the audio in parquet files and Hub data sets.")
    text_column: str = option("text", "Column with the text.")
    order: int = option(3, f"Longest n-grams, 2 to {MAX_ORDER}.")
    exclude_corpus: list[str] = option([], "Sources whose texts must not be in the n-gram, to be scored on.")
    exclude_splits: list[str] = option(["test"], "Splits of exclude_corpus.")
    output_file: str = option("lm.arpa", "ARPA file to write.")

    def __post_init__(self):
        if not self.text_files and not self.corpus:
            raise ValueError("no texts: give text_files, corpus or both")
        if self.casing is not None and self.model is not None:
            raise ValueError("casing is what the model was fine-tuned with: leave it out, or model")
        TextPolicy(casing=self.casing or "lower")
        if not 2 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be 2 to {MAX_ORDER}, found {self.order}")
        if missing := [file for file in self.text_files if not Path(file).is_file()]:
            raise FileNotFoundError(f"text_files: no file {', '.join(missing)}")


@dataclass
class NGram:
    """A back-off n-gram.

    Attributes:
        log10_probs: of every n-gram, for every order from 1 on: of its last word after the others.
        log10_backoffs: of every n-gram that others begin with.
    """

    log10_probs: list[dict[tuple[str, ...], float]]
    log10_backoffs: list[dict[tuple[str, ...], float]]

    def save(self, file: str | Path) -> None:
        """Write an ARPA file, which kenlm, SRILM and others read."""
        with open(file, "w", encoding="utf-8") as arpa:
            arpa.write("\\data\\\n")
            arpa.writelines(f"ngram {order}={len(probs)}\n" for order, probs in enumerate(self.log10_probs, 1))
            for order, (probs, backoffs) in enumerate(zip(self.log10_probs, self.log10_backoffs), 1):
                arpa.write(f"\n\\{order}-grams:\n")
                for words, prob in probs.items():
                    backoff = "" if order == len(self.log10_probs) else f"\t{backoffs.get(words, 0.0):.7g}"
                    arpa.write(f"{prob:.7g}\t{' '.join(words)}{backoff}\n")
            arpa.write("\n\\end\\\n")


def estimate(sentences: list[list[str]], order: int) -> NGram:
    """Interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998, section 3).

    Below the highest order, an n-gram counts once for every word that it was seen after, but for those that begin a
    sentence, which count as often as they were seen. Unigrams are interpolated with a uniform distribution over the
    vocabulary, the end of sentence and the unknown word, whose only share that is.

    Args:
        sentences: words of each.
        order: longest n-grams.

    Raises:
        ValueError: no sentences, or a word that is a mark of the ARPA format.
    """
    counts: list[Counter] = [Counter() for _ in range(order)]
    for words in sentences:
        if marks := {BEGIN, END, UNKNOWN} & set(words):
            raise ValueError(f"the texts hold {', '.join(sorted(marks))}, which mean something else in an n-gram")
        padded = [BEGIN, *words, END]
        for length in range(1, order + 1):
            counts[length - 1].update(tuple(padded[i : i + length]) for i in range(len(padded) - length + 1))
    if not sentences:
        raise ValueError("no sentences to make an n-gram of")
    for length in range(1, order):
        preceded = Counter(words[1:] for words in counts[length])
        counts[length - 1] = {words: preceded.get(words, count) for words, count in counts[length - 1].items()}
    counts[0] = {words: count for words, count in counts[0].items() if words != (BEGIN,)}

    probs: list[dict] = []
    backoffs: list[dict] = []
    vocabulary = [*counts[0], (UNKNOWN,)]
    lower = {(): 1 / len(vocabulary)}
    for length, table in enumerate(counts, 1):
        discounts = _discounts(table, length)
        totals, freed = Counter(), Counter()
        for words, count in table.items():
            totals[words[:-1]] += count
            freed[words[:-1]] += discounts[min(count, 3) - 1]
        backoff = {context: freed[context] / total for context, total in totals.items()}
        probs.append(
            {
                words: (table[words] - discounts[min(table[words], 3) - 1] if words in table else 0.0)
                / totals[words[:-1]]
                + backoff[words[:-1]] * lower[words[1:] if length > 1 else ()]
                for words in (vocabulary if length == 1 else table)
            }
        )
        backoffs.append(backoff)
        lower = probs[-1]
    log10_probs = [{words: math.log10(prob) for words, prob in table.items()} for table in probs]
    log10_probs[0][(BEGIN,)] = -99.0  # never predicted: it only stands before others
    log10_backoffs = [{words: math.log10(weight) for words, weight in table.items()} for table in backoffs[1:]]
    return NGram(log10_probs, [*log10_backoffs, {}])


def _discounts(table: dict[tuple[str, ...], int], length: int) -> tuple[float, float, float]:
    """What is taken off counts of one, two, and three or more (Chen and Goodman 1998, equation 26)."""
    number = Counter(table.values())
    if all(number[count] for count in (1, 2, 3, 4)):
        share = number[1] / (number[1] + 2 * number[2])
        discounts = tuple(count - (count + 1) * share * number[count + 1] / number[count] for count in (1, 2, 3))
        if all(0 < discount <= count for count, discount in enumerate(discounts, 1)):
            return discounts
    logger.warning("too few %d-grams to estimate discounts: %s are taken", length, FALLBACK_DISCOUNTS)
    return FALLBACK_DISCOUNTS


def read_words(file: str | Path) -> set[str] | None:
    """The words of an ARPA file, which may be compressed by gzip; None of another file, such as kenlm's binaries."""
    words = set()
    with open(file, "rb") as begin:
        is_compressed = begin.read(2) == b"\x1f\x8b"
    with gzip.open(file) if is_compressed else open(file, "rb") as arpa:
        if not re.match(rb"(\s|#.*\n)*\\data\\", arpa.read(10_000)):
            return None
        arpa.seek(0)
        for line in arpa:
            if line.startswith(b"\\1-grams:"):
                break
        for line in arpa:
            if line.startswith(b"\\"):
                break
            if len(fields := line.decode("utf-8").split()) > 1:
                words.add(fields[1])
    return words - {BEGIN, END, UNKNOWN}


def text_policy_of(model: str) -> TextPolicy:
    """What was done to the texts that a recogniser was fine-tuned on.

    Args:
        model: its folder or Hub name.

    Raises:
        FileNotFoundError: no such model.
        ValueError: its configuration does not tell.
    """
    policy = getattr(AutoConfig.from_pretrained(find_model(model), trust_remote_code=False), "text_policy", None)
    if policy is None:
        raise ValueError(
            f"model: config.json of {model} has no text_policy, which finetune_ctc.py writes: leave model out to "
            f"take the texts with {TextPolicy()}"
        )
    return TextPolicy(**policy)


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_arguments([LanguageModelArguments], DESCRIPTION, argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        _build(args)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


def _build(args: LanguageModelArguments) -> None:
    policy = text_policy_of(args.model) if args.model is not None else TextPolicy(casing=args.casing or "lower")
    print(f"texts: {policy}")
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)

    def load_texts(source: str | list[str], split: str) -> list[str | None]:
        return load_corpus(source, split, args.audio_column, args.text_column, require_text=True)["text"]

    texts = []
    for file in args.text_files:
        try:
            texts += Path(file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"text_files: {file} is not UTF-8 text: {error}") from None
    if args.corpus:
        texts += load_texts(args.corpus, args.split)
    texts = [text for text in texts if text and policy(text)]
    given = [policy(text) for text in texts if not policy.leaves_out(text)]
    if without := len(texts) - len(given):
        print(f"{without} of {len(texts)} sentences are left out for their digits")
    excluded = {
        policy(text)
        for split in args.exclude_splits
        for source in args.exclude_corpus
        for text in load_texts(source, split)
        if text
    }
    kept = [text for text in given if text not in excluded]
    if args.exclude_corpus:
        print(
            f"{len(given) - len(kept)} of {len(given)} sentences are left out, as they are texts of "
            f"{', '.join(args.exclude_splits)} of the excluded corpora"
        )
    ngram = estimate([text.split() for text in kept], args.order)
    ngram.save(args.output_file)
    sizes = ", ".join(f"{len(table)} {order}-grams" for order, table in enumerate(ngram.log10_probs, 1))
    print(f"{args.output_file}: {len(kept)} sentences, {sizes}")
