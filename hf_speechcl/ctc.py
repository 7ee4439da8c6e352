"""From transcripts to CTC labels: vocabulary, processor, and the check of what can be aligned."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

BLANK, WORD_DELIMITER, UNKNOWN = "[PAD]", "|", "[UNK]"


def build_processor(texts: list[str], sampling_rate: int) -> Wav2Vec2Processor:
    """A stock processor whose vocabulary is the characters of `texts`, with the CTC blank as token 0."""
    characters = sorted(set("".join(texts)) - {" ", WORD_DELIMITER})
    if not characters:
        raise ValueError("the training texts hold no characters to make a vocabulary of")
    vocabulary = {token: number for number, token in enumerate([BLANK, WORD_DELIMITER, UNKNOWN, *characters])}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(file),
            bos_token=None,
            eos_token=None,
            unk_token=UNKNOWN,
            pad_token=BLANK,
            word_delimiter_token=WORD_DELIMITER,
        )
    feature_extractor = Wav2Vec2FeatureExtractor(
        sampling_rate=sampling_rate, do_normalize=False, return_attention_mask=True
    )
    return Wav2Vec2Processor(feature_extractor=feature_extractor, tokenizer=tokenizer)


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
    tokenizer: Wav2Vec2CTCTokenizer,
    frame_length: Callable[[int], int],
    sampling_rate: int,
    max_seconds: float | None = None,
) -> tuple[list[int], PreflightReport]:
    """Find the clips that CTC can be trained on.

    Args:
        corpus: rows with `id` and `duration`.
        texts: normalised transcript of every row, None where there is none.
        frame_length: encoder frames of a number of samples at `sampling_rate`.
        max_seconds: longer clips are left out.

    Returns:
        The rows to keep, and a report on the others: no text, an empty text, characters outside the vocabulary, too
        long, or fewer frames than labels plus the blanks that must stand between equal neighbours (Graves et al. 2006).
    """
    vocabulary = set(tokenizer.get_vocab())
    durations = corpus["duration"]
    report = PreflightReport(len(texts), sum(durations) / 3600)
    kept = []
    for row, (name, duration, text) in enumerate(zip(corpus["id"], durations, texts)):
        reason = detail = None
        if text is None:
            reason, detail = "no text", "None"
        elif not text:
            reason, detail = "empty text", "nothing is left after normalisation"
        elif special := [token for token in (BLANK, UNKNOWN) if token in text]:
            reason, detail = "characters outside the vocabulary", " ".join(special)
        elif unknown := sorted(set(text) - vocabulary - {" "} | ({WORD_DELIMITER} & set(text))):
            reason, detail = "characters outside the vocabulary", " ".join(unknown)
        elif max_seconds is not None and duration > max_seconds:
            reason, detail = "too long", f"{duration:.1f} s > {max_seconds:g} s"
        else:
            frames = frame_length(round(duration * sampling_rate))
            repeats = sum(left == right for left, right in zip(text, text[1:]))
            if frames < len(text) + repeats:
                reason = "too short for its text"
                detail = f"{frames} frames < {len(text)} labels + {repeats} repeats"
        if reason is None:
            kept.append(row)
        else:
            report.problems.append({"id": name, "duration": duration, "reason": reason, "detail": detail})
    return kept, report
