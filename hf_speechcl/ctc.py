"""From transcripts to CTC labels: vocabulary, processor, and the check of what can be aligned."""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ParakeetTokenizer,
    PreTrainedTokenizerBase,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

logger = logging.getLogger(__name__)

BLANK, WORD_DELIMITER, UNKNOWN = "[PAD]", "|", "[UNK]"
WORD_START = "▁"  # begins the first piece of a word, in vocabularies of pieces
VOCABULARIES = ("characters", "unigram", "bpe")


def build_processor(
    texts: list[str], sampling_rate: int, vocabulary: str = "characters", vocab_size: int | None = None
) -> Wav2Vec2Processor:
    """A stock processor with a vocabulary of `texts`, in which the CTC blank is token 0.

    Args:
        texts: what the model is to write, as a `TextPolicy` leaves it.
        sampling_rate: of the model, in Hz.
        vocabulary: characters; or pieces of words, found by a unigram model (Kudo 2018, arXiv 1804.10959) or by byte
            pair encoding (bpe; Sennrich et al. 2016, arXiv 1508.07909).
        vocab_size: number of tokens, blank and unknown among them, for pieces. Texts that do not have so many give
            fewer, which is logged.

    Raises:
        ValueError: texts without characters, or more characters than vocab_size has room for.
    """
    if not set("".join(texts)) - {" "}:
        raise ValueError("the training texts hold no characters to make a vocabulary of")
    if vocabulary == "characters":
        tokenizer = _character_tokenizer(texts)
    else:
        tokenizer = _piece_tokenizer(texts, vocabulary, vocab_size)
    feature_extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=sampling_rate, do_normalize=False, return_attention_mask=True
    )
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


def _character_tokenizer(texts: list[str]) -> Wav2Vec2CTCTokenizer:
    characters = sorted(set("".join(texts)) - {" ", WORD_DELIMITER})
    vocabulary = {token: number for number, token in enumerate([BLANK, WORD_DELIMITER, UNKNOWN, *characters])}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(file),
            bos_token=None,
            eos_token=None,
            unk_token=UNKNOWN,
            pad_token=BLANK,
            word_delimiter_token=WORD_DELIMITER,
        )


def _piece_tokenizer(texts: list[str], vocabulary: str, vocab_size: int) -> ParakeetTokenizer:
    """A tokenizer of pieces, whose class merges repeats and leaves out blanks when it decodes."""
    num_characters = len(set("".join(texts)) - {" "} | {WORD_START})
    if vocab_size < num_characters + 2:
        raise ValueError(
            f"vocab_size={vocab_size} has no room for the {num_characters} characters of the training texts, the blank "
            f"and the unknown token: raise it to {num_characters + 2} at least, or use vocabulary=characters"
        )
    options = {"vocab_size": vocab_size, "special_tokens": [BLANK, UNKNOWN], "show_progress": False}
    if vocabulary == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token=UNKNOWN, **options)
    else:
        tokenizer, trainer = Tokenizer(models.BPE(unk_token=UNKNOWN)), trainers.BpeTrainer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_START, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = ParakeetTokenizer(tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=BLANK)
    if len(tokenizer) < vocab_size:
        logger.warning(
            "the training texts have %d %s pieces, fewer than vocab_size=%d", len(tokenizer), vocabulary, vocab_size
        )
    return tokenizer


@dataclass
class PreflightReport:
    """What a pre-flight check left out.

    Attributes:
        num_clips, hours: of the whole corpus.
        problems: `{"id", "duration", "reason", "detail"}` of every clip left out.
    """

    num_clips: int
    hours: float
    problems: list[dict] = field(default_factory=list)

    @property
    def hours_left_out(self) -> float:
        return sum(problem["duration"] for problem in self.problems) / 3600

    def __str__(self) -> str:
        if not self.problems:
            return f"pre-flight check: all {self.num_clips} clips ({self.hours:.2f} h) can be trained on"
        lines = [
            f"pre-flight check: {len(self.problems)} of {self.num_clips} clips "
            f"({self.hours_left_out:.3f} of {self.hours:.2f} h) are left out"
        ]
        for reason, count in Counter(problem["reason"] for problem in self.problems).most_common():
            chosen = [problem for problem in self.problems if problem["reason"] == reason]
            hours = sum(problem["duration"] for problem in chosen) / 3600
            examples = "; ".join(f"{problem['id']} ({problem['detail']})" for problem in chosen[:3])
            lines.append(f"  {reason}: {count} clips, {hours:.3f} h, such as {examples}")
        return "\n".join(lines)

    def save(self, file: Path) -> None:
        """Write every clip left out, with its reason, as JSON."""
        report = {**vars(self), "hours_left_out": self.hours_left_out}
        file.write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def preflight(
    corpus: datasets.Dataset,
    texts: list[str | None],
    tokenizer: PreTrainedTokenizerBase,
    frame_length: Callable[[int], int],
    sampling_rate: int,
    max_seconds: float | None = None,
    left_out: dict[int, tuple[str, str]] | None = None,
) -> tuple[list[int], list[list[int]], PreflightReport]:
    """Find the clips that CTC can be trained on.

    Args:
        corpus: rows with `id` and `duration`.
        texts: transcript of every row as it is trained on, None where there is none.
        tokenizer: makes labels of texts; its pad token is the blank.
        frame_length: encoder frames of a number of samples at `sampling_rate`.
        max_seconds: longer clips are left out.
        left_out: rows that are left out already, with reason and detail.

    Returns:
        The rows to keep, their labels, and a report on the others: no text, an empty text, characters outside the
        vocabulary, too long, or fewer frames than labels plus the blanks that must stand between equal neighbours
        (Graves et al. 2006).
    """
    reserved = getattr(tokenizer, "word_delimiter_token", WORD_START)
    labels = tokenizer([text or "" for text in texts]).input_ids
    durations = corpus["duration"]
    report = PreflightReport(len(texts), sum(durations) / 3600)
    kept = []
    for row, (name, duration, text, ids) in enumerate(zip(corpus["id"], durations, texts, labels)):
        reason = detail = None
        if row in (left_out or {}):
            reason, detail = left_out[row]
        elif text is None:
            reason, detail = "no text", "None"
        elif not text:
            reason, detail = "empty text", "nothing is left after normalisation"
        elif unknown := _outside(text, ids, tokenizer, reserved):
            reason, detail = "characters outside the vocabulary", " ".join(unknown)
        elif max_seconds is not None and duration > max_seconds:
            reason, detail = "too long", f"{duration:.1f} s > {max_seconds:g} s"
        else:
            frames = frame_length(round(duration * sampling_rate))
            repeats = sum(left == right for left, right in zip(ids, ids[1:]))
            if frames < len(ids) + repeats:
                reason = "too short for its text"
                detail = f"{frames} frames < {len(ids)} labels + {repeats} repeats"
        if reason is None:
            kept.append(row)
        else:
            report.problems.append({"id": name, "duration": duration, "reason": reason, "detail": detail})
    return kept, [labels[row] for row in kept], report


def _outside(text: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, reserved: str) -> list[str]:
    """What of a text has no label of its own."""
    special = [token for token in (tokenizer.pad_token, tokenizer.unk_token) if token in text]
    if special or reserved in text:
        return special or [reserved]
    if tokenizer.unk_token_id not in ids:
        return []
    return sorted(char for char in set(text) - {" "} if tokenizer.unk_token_id in tokenizer(char).input_ids)
