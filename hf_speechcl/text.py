"""What is done to texts before they are trained on or scored."""

import re
import unicodedata


def normalize_text(text: str, method: str = "basic") -> str:
    """Bring a transcript into the form that is trained on and scored.

    Args:
        method: "basic" (Unicode NFKC, lower case; letters, marks, digits and apostrophes within words are kept,
            everything else becomes a space) or "none" (only white space is collapsed).
    """
    if method == "basic":
        text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
        text = "".join(char if char == "'" or unicodedata.category(char)[0] in "LMN" else " " for char in text)
        text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    elif method != "none":
        raise ValueError(f"unknown text normalisation {method!r}: expected basic or none")
    return " ".join(text.split())
