"""CTC posteriors → text, words with times and confidences: greedy, or beam search with an n-gram and hot words."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from .command_line import option

WORD_START = "▁"  # begins the pieces of subword vocabularies that begin a word


@dataclass
class Word:
    """A word, its time in seconds and how sure the model is of it, between 0 and 1."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass
class Transcript:
    """What was said. `words` and `confidence` are None where a model does not tell them."""

    text: str
    words: list[Word] | None
    confidence: float | None


@dataclass
class DecodingArguments:
    """How posteriors become text."""

    beam_width: int = option(1, "Hypotheses kept in beam search; 1 takes the best token of every frame (greedy).")
    lm: str | None = option(None, "n-gram for beam search, ARPA or kenlm binary, as scripts/build_lm.py makes them.")
    lm_weight: float = option(0.5, "Weight of the n-gram's log-probabilities (alpha).")
    word_bonus: float = option(1.5, "Added for every word in beam search with an n-gram (beta).")
    hot_words: list[str] = option([], "Words or phrases that beam search is to favour.")
    hot_word_weight: float = option(10.0, "How much hot words are favoured.")

    def __str__(self) -> str:
        return "greedy"


def build_decoder(tokenizer: PreTrainedTokenizerBase, seconds_per_frame: float, arguments: DecodingArguments):
    """The decoder that the options ask for; `decode(log_probs)` gives a `Transcript`.

    Args:
        tokenizer: of a CTC model: characters with a word delimiter (`Wav2Vec2CTCTokenizer`), or pieces of which "▁"
            begins a word (`ParakeetTokenizer`). Its padding token is the blank.
        seconds_per_frame: of the posteriors.
    """
    return GreedyDecoder(tokenizer, seconds_per_frame)


class GreedyDecoder:
    """The best token of every frame, repetitions merged, blanks and other special tokens left out (Graves et al. 2006).

    A token's confidence is its highest posterior among the frames it was emitted in, a word's is the mean over its
    tokens, a transcript's the mean over its words.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seconds_per_frame: float):
        self.tokenizer, self.seconds_per_frame = tokenizer, seconds_per_frame
        self.delimiter = getattr(tokenizer, "word_delimiter_token_id", None)
        special = set(tokenizer.all_special_ids) - {self.delimiter}
        self.pieces = [
            None if number in special else piece
            for number, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        ]

    def decode(self, log_probs: np.ndarray) -> Transcript:
        """Transcribe.

        Args:
            log_probs: (T, V) float32, log-posteriors of the tokens in every frame.
        """
        best = log_probs.argmax(-1)
        starts = np.flatnonzero(np.diff(best, prepend=-1))
        words, current = [], []
        for start, end in zip(starts, [*starts[1:], len(best)]):
            token = int(best[start])
            piece = self.pieces[token] if token < len(self.pieces) else None
            if piece is None:
                continue
            if token == self.delimiter or piece.startswith(WORD_START):
                words += self._word(current)
                current = []
            if token != self.delimiter:
                current.append((token, start, end, float(np.exp(log_probs[start:end, token].max()))))
        return make_transcript(words + self._word(current))

    def _word(self, tokens: list[tuple[int, int, int, float]]) -> list[Word]:
        """One word of its tokens with their first frame, last frame + 1 and confidence; none of none."""
        text = self.tokenizer.decode([token for token, *_ in tokens], group_tokens=False).strip() if tokens else ""
        if not text:
            return []
        confidence = float(np.mean([confidence for *_, confidence in tokens]))
        seconds = self.seconds_per_frame
        return [Word(text, float(tokens[0][1] * seconds), float(tokens[-1][2] * seconds), confidence)]


def make_transcript(words: list[Word]) -> Transcript:
    """The transcript of words in their order."""
    confidence = float(np.mean([word.confidence for word in words])) if words else None
    return Transcript(" ".join(word.text for word in words), words, confidence)
