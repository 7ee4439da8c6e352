"""What is done to the texts that a recogniser is trained on: casing, punctuation, digits; and a report of it."""

import contextlib
import json
import re
import unicodedata
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cache
from pathlib import Path

from .text import compatible, remove_punctuation

CHOICES = {
    "casing": ("lower", "upper", "keep"),
    "punctuation": ("remove", "keep"),
    "digits": ("keep", "words", "leave_out"),
}
RULES = ("white space", "unicode", "digits", "casing", "punctuation")
MAX_EXAMPLES = 5
# Languages that write a decimal point and commas between thousands; the others do the reverse.
DECIMAL_POINT = {"am", "bn", "cy", "en", "es_GT", "es_NI", "he", "hi", "ja", "kn", "ko", "te", "th", "zh"}


def spell_numbers(text: str, language: str = "en") -> str:
    """Numbers as words: "call 4 of 1,200" → "call four of one thousand, two hundred".

    Decimals and English ordinals (4th) are read as such, a number with a leading zero digit by digit, everything else,
    a year too, as a cardinal number; digits with spaces between them, as in telephone numbers, as several.

    Args:
        language: a code that num2words knows, such as en, de, fr, es, ru.

    Raises:
        ValueError: num2words does not know the language.
        ModuleNotFoundError: num2words is not installed.
    """
    say = _number_speaker(language)
    thousands, decimal = (",", ".") if {language, language.split("_")[0]} & DECIMAL_POINT else (".", ",")
    number = rf"(?P<whole>\d{{1,3}}(?:[{thousands}]\d{{3}})+(?!\d)|\d+)(?:[{decimal}](?P<fraction>\d+))?"
    if language.startswith("en"):
        number += r"(?P<ordinal>(?i:st|nd|rd|th)\b)?"

    def in_words(match: re.Match) -> str:
        whole, fraction = match["whole"].replace(thousands, ""), match["fraction"]
        try:
            if len(whole) > 1 and int(whole[0]) == 0:
                words = " ".join(say(int(digit)) for digit in whole + (fraction or ""))
            elif fraction is not None:
                words = _say_decimal(say, whole, fraction)
            else:
                words = say(int(whole), to="ordinal" if match.groupdict().get("ordinal") else "cardinal")
        except Exception:  # what num2words raises where a language has no words for a number differs
            words = " ".join(say(int(digit)) for digit in whole + (fraction or ""))
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        return " " * before.isalnum() + words + " " * after.isalnum()

    return re.sub(number, in_words, text)


def _say_decimal(say, whole: str, fraction: str) -> str:
    """A decimal; where digits after the point are read one by one, with the zeros at the end, unlike num2words.

    Raises:
        ValueError: num2words leaves out the fraction, or zeros in it.
    """

    def reads_digits(kind: type) -> bool:
        with contextlib.suppress(Exception):  # what num2words raises differs by language
            return say(kind("2.14")).endswith(f" {say(1)} {say(4)}")
        return False

    kind = next(filter(reads_digits, (Decimal, float)), None)  # some languages have words for floats alone
    said, number = fraction.rstrip("0"), kind or Decimal
    if said[:1] == "0" and say(number(f"{whole}.{said}")) == say(number(f"{whole}.{said.lstrip('0')}")):
        raise ValueError(f"no words for the zeros of {fraction}")
    if kind is None:
        words = say(Decimal(f"{whole}.{fraction}"))
        if said and words in ("", say(int(whole))):
            raise ValueError(f"no words for {fraction}")
        return words
    words = say(kind(f"{whole}.{said}")) if said else say(kind(f"{whole}.1")).removesuffix(f" {say(1)}")
    return " ".join([words, *[say(0)] * (len(fraction) - len(said))])


@cache
def _number_speaker(language: str):
    try:
        import num2words
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "digits=words needs the package num2words, which is not installed: pip install hf_speechcl[text], or "
            "choose keep or leave_out"
        ) from error
    if language not in num2words.CONVERTER_CLASSES:
        raise ValueError(
            f"text_language: num2words does not know {language!r}, it knows "
            f"{', '.join(sorted(num2words.CONVERTER_CLASSES))}"
        )
    return lambda number, to="cardinal": num2words.num2words(number, lang=language, to=to)


@dataclass(frozen=True)
class TextPolicy:
    """What is done to a transcript before it is trained on.

    With the defaults it is what `normalize_text(text, "basic")` does, with casing and punctuation "keep" what "none"
    does. White space is always collapsed.

    Args:
        casing: lower, upper or keep.
        punctuation: "remove" keeps letters, marks, digits and apostrophes within words, after Unicode NFKC; "keep"
            keeps everything.
        digits: keep; words (see `spell_numbers`), a text with ½ or ² is left out; or leave_out, the whole text if it
            has digits.
        language: of the words for numbers.

    Raises:
        ValueError: an unknown choice or language.
    """

    casing: str = "lower"
    punctuation: str = "remove"
    digits: str = "keep"
    language: str = "en"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {', '.join(choices)}, found {getattr(self, name)!r}")
        if self.digits == "words":
            _number_speaker(self.language)

    def steps(self, text: str) -> list[tuple[str, str]]:
        """The text after every rule that may change it, `(rule, text)` in order."""
        steps = []

        def then(rule: str, changed: str) -> None:
            nonlocal text
            text = changed
            steps.append((rule, text))

        then("white space", " ".join(text.split()))
        if self.punctuation == "remove":
            then("unicode", compatible(text))
        if self.digits == "words":
            then("digits", spell_numbers(text, self.language))
        if self.casing != "keep":
            then("casing", text.lower() if self.casing == "lower" else text.upper())
        if self.punctuation == "remove":
            then("punctuation", remove_punctuation(text))
        return steps

    def __call__(self, text: str) -> str:
        return self.steps(text)[-1][1]

    def leaves_out(self, text: str) -> bool:
        """Whether a text is not to be trained on, for its digits: any, or fractions and powers, which have no words."""
        kinds = {"leave_out": "N", "words": "No"}.get(self.digits)
        return kinds is not None and any(unicodedata.category(char).startswith(kinds) for char in text)

    def __str__(self) -> str:
        digits = f"words ({self.language})" if self.digits == "words" else self.digits
        return f"casing {self.casing}, punctuation {self.punctuation}, digits {digits}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass
class TextReport:
    """What a policy changed.

    Attributes:
        policy: the policy's fields.
        num_texts: that there were.
        counts: `{rule: number of texts it changed}`.
        examples: `{rule: [{"before", "after"}, …]}`, the first few of each rule, around that rule alone.
    """

    policy: dict[str, str]
    num_texts: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.counts:
            return f"texts: all {self.num_texts} stay as they are"
        lines = [f"texts, {TextPolicy(**self.policy)}:"]
        for rule, count in self.counts.items():
            shortest = sorted(self.examples[rule], key=lambda example: len(example["before"]))[:2]
            examples = "; ".join(f"{each['before']!r} → {each['after']!r}" for each in shortest)
            lines.append(f"  {rule}: {count} of {self.num_texts} texts, such as {examples}")
        return "\n".join(lines)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self), indent=1, ensure_ascii=False), encoding="utf-8")


def apply_policy(policy: TextPolicy, texts: list[str | None]) -> tuple[list[str | None], TextReport]:
    """Texts as they are trained on, None where there is none, and a report of what was changed."""
    report = TextReport(policy.to_dict())
    changed = []
    for text in texts:
        if text is None:
            changed.append(None)
            continue
        report.num_texts += 1
        before = text
        for rule, after in policy.steps(text):
            if after != before:
                report.counts[rule] = report.counts.get(rule, 0) + 1
                examples = report.examples.setdefault(rule, [])
                if len(examples) < MAX_EXAMPLES:
                    examples.append({"before": before, "after": after})
            before = after
        changed.append(before)
    report.counts = {rule: report.counts[rule] for rule in RULES if rule in report.counts}
    return changed, report
