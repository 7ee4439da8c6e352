"""What is done to texts before they are trained on or scored."""

import re
import unicodedata
from functools import cache

ZERO_WIDTH_SPACE = "\u200b"  # between words where no space is written, as in Khmer
NORMALIZATIONS = ("none", "basic", "whisper_english")


def normalize_text(text: str, method: str = "basic") -> str:
    """Bring a transcript into the form that is trained on and scored.

    Args:
        method: "basic" (Unicode NFKC, lower case; letters, marks, digits and apostrophes within words are kept,
            invisible format characters left out, everything else becomes a space), "whisper_english" (as English
            results of Whisper are scored: besides lower case and no punctuation, numbers as digits, American spelling,
            contractions and titles in full, no "um" and no text in brackets), or "none" (only white space is
            collapsed).

    Raises:
        ValueError: no such method.
        ModuleNotFoundError: whisper_english without the package whisper-normalizer.

    Source: whisper_english is of Radford et al. 2022, arXiv 2212.04356, appendix C.
    """
    if method == "basic":
        text = remove_punctuation(compatible(text).lower())
    elif method == "whisper_english":
        text = _whisper_english()(text)
    elif method != "none":
        raise ValueError(f"unknown text normalisation {method!r}: expected {', '.join(NORMALIZATIONS)}")
    return " ".join(text.split())


def compatible(text: str) -> str:
    """Unicode NFKC, but for accents that stand alone: an acute one is meant as an apostrophe, the others become spaces
    rather than marks on them."""
    text = text.replace("´", "'")
    forms = {char: unicodedata.normalize("NFKC", char) for char in set(text)}
    alone = {char for char, form in forms.items() if form[0] == " " and len(form) > 1}
    return unicodedata.normalize("NFKC", "".join(" " if char in alone else char for char in text))


def remove_punctuation(text: str) -> str:
    """Letters, marks, digits and apostrophes within words are kept, everything else becomes a space, but format
    characters, such as joiners and soft hyphens, which are within words, nothing."""
    text = text.replace("’", "'").replace(ZERO_WIDTH_SPACE, " ")
    text = "".join(
        char if char == "'" or category[0] in "LMN" else "" if category == "Cf" else " "
        for char, category in zip(text, map(unicodedata.category, text))
    )
    return " ".join(re.sub(r"(?<![^\s'])'|'(?![^\s'])", " ", text).split())


@cache
def _whisper_english():
    """The normaliser with its list of spellings, which transformers has the code of but not the list."""
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "text normalisation whisper_english needs the package whisper-normalizer, which is not installed: "
            "pip install hf_speechcl[eval], or choose basic or none"
        ) from error
    return EnglishTextNormalizer()
