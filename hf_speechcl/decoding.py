"""CTC posteriors → text, words with times and confidences: greedy, or beam search with an n-gram and hot words."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .command_line import option
from .ctc import WORD_START
from .language_model import read_words

logger = logging.getLogger(__name__)

ALIGNMENT_MARGIN = 25  # frames
MIN_LOG_PROB = math.log(1e-15)  # beneath which pyctcdecode takes no posterior
INSTALL_LM = "pip install 'hf_speechcl[lm]' && pip install --no-deps pyctcdecode"


@dataclass
class Word:
    """A word, its time in seconds and how sure the model is of it, between 0 and 1."""

    text: str
    start: float
    end: float
    confidence: float


@dataclass
class Transcript:
    """What was said. `words` and `confidence` are None where a model does not tell them, `confidence` also where
    nothing was said."""

    text: str
    words: list[Word] | None
    confidence: float | None


@dataclass
class DecodingArguments:
    """How posteriors of a CTC model become text."""

    beam_width: int = option(1, "Hypotheses kept in beam search; 1 takes the best token of every frame (greedy).")
    lm: str | None = option(None, "n-gram for beam search: ARPA, as scripts/build_lm.py writes it, or kenlm binary.")
    lm_weight: float = option(0.5, "Weight of the n-gram's log-probabilities (alpha); tune it on validation clips.")
    word_bonus: float = option(1.0, "Added for every word with an n-gram (beta); tune it on validation clips.")
    hot_words: list[str] = option([], "Words that beam search is to favour; of phrases, each word.")
    hot_word_weight: float = option(
        5.0, "Log-probability that a hot word is worth; too much writes it where it is not said."
    )

    def __post_init__(self):
        if self.beam_width < 1:
            raise ValueError(f"beam_width must be 1 (greedy) or more, found {self.beam_width}")
        for name in ("lm", "hot_words"):
            if getattr(self, name) and not self.uses_beam:
                raise ValueError(f"{name} needs beam search: set beam_width, to 100 for instance")
        for name, needed in {"lm_weight": "lm", "word_bonus": "lm", "hot_word_weight": "hot_words"}.items():
            if not getattr(self, needed) and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}={getattr(self, name):g} does nothing without {needed}: leave it out")
        if self.lm is not None and not Path(self.lm).is_file():
            raise FileNotFoundError(f"lm: no file {self.lm}")
        if self.lm_weight < 0:
            raise ValueError(f"lm_weight must not be negative, found {self.lm_weight}")

    @property
    def uses_beam(self) -> bool:
        return self.beam_width > 1

    def __str__(self) -> str:
        """A few words for tables and cards."""
        if not self.uses_beam:
            return "greedy"
        parts = [f"beam {self.beam_width}"]
        if self.lm is not None:
            parts.append(f"n-gram {Path(self.lm).name} (weight {self.lm_weight:g}, word bonus {self.word_bonus:g})")
        if self.hot_words:
            parts.append(f"{len(self.hot_words)} hot words (weight {self.hot_word_weight:g})")
        return ", ".join(parts)


class Vocabulary:
    """What the outputs of a CTC model stand for.

    Args:
        tokenizer: characters with a word delimiter (`Wav2Vec2CTCTokenizer`), or pieces of which "▁" begins a word
            (`ParakeetTokenizer`). Its padding token is the blank.

    Attributes:
        pieces: text of every token; None for the blank and other special tokens, which are never written.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.blank = tokenizer.pad_token_id
        if self.blank is None:
            raise ValueError("the tokenizer has no padding token, which is to be the CTC blank")
        delimiter = getattr(tokenizer, "word_delimiter_token_id", None)
        special = set(tokenizer.all_special_ids) - {delimiter}
        self.pieces: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        for token in special:
            self.pieces[token] = None
        if delimiter is not None:
            self.pieces[delimiter] = " "

    def piece(self, token: int) -> str | None:
        return self.pieces[token] if token < len(self.pieces) else None

    def word(self, tokens: list[int]) -> str:
        """The word that tokens spell."""
        return self.tokenizer.decode(tokens, group_tokens=False).strip()


def build_decoder(
    tokenizer: PreTrainedTokenizerBase, seconds_per_frame: float, arguments: DecodingArguments
) -> "GreedyDecoder | BeamDecoder":
    """The decoder that the options ask for: `decode(log_probs)` gives a `Transcript`.

    Args:
        tokenizer: of a CTC model; see `Vocabulary`.
        seconds_per_frame: of the posteriors.
    """
    vocabulary = Vocabulary(tokenizer)
    if arguments.uses_beam:
        return BeamDecoder(vocabulary, seconds_per_frame, arguments)
    return GreedyDecoder(vocabulary, seconds_per_frame)


class GreedyDecoder:
    """The best token of every frame, repetitions merged, blanks and other special tokens left out (Graves et al. 2006).

    The text is that of `tokenizer.decode`, but for special tokens and repeated spaces.
    """

    def __init__(self, vocabulary: Vocabulary, seconds_per_frame: float):
        self.vocabulary, self.seconds_per_frame = vocabulary, seconds_per_frame

    def decode(self, log_probs: np.ndarray) -> Transcript:
        """Transcribe (T, V) float32 log-posteriors of the tokens in every frame."""
        best = log_probs.argmax(-1)
        starts = np.flatnonzero(np.diff(best, prepend=-1))
        words, current = [], []
        for start, end in zip(starts, [*starts[1:], len(best)]):
            token = int(best[start])
            piece = self.vocabulary.piece(token)
            if piece is None:
                continue
            if piece == " " or piece.startswith(WORD_START):
                words.append(current)
                current = []
            if piece != " ":
                current.append((token, start, end))
        words = [
            _word(self.vocabulary.word([token for token, *_ in word]), word, log_probs, self.seconds_per_frame)
            for word in [*words, current]
            if word
        ]
        return _transcript([word for word in words if word.text])


class _WordStart(str):
    """The piece "▁" for pyctcdecode, which after a piece that ends so begins a word in whatever hypothesis is next."""

    def __getitem__(self, key):
        return "" if key == slice(-1, None) else super().__getitem__(key)


class BeamDecoder:
    """Prefix beam search with an n-gram and hot words (Hannun et al. 2014), by pyctcdecode.

    The blank takes the probability of other special tokens. Times and confidences of a word are those of its best
    alignment in the frames where the search found it; confidences are the model's alone, without the n-gram.
    """

    def __init__(self, vocabulary: Vocabulary, seconds_per_frame: float, arguments: DecodingArguments):
        try:
            import kenlm
            from pyctcdecode import Alphabet, BeamSearchDecoderCTC, LanguageModel
        except ImportError as error:
            raise ImportError(f"beam search needs pyctcdecode and kenlm ({error}): {INSTALL_LM}") from None
        logging.getLogger("pyctcdecode").setLevel(logging.ERROR)  # it warns of every small n-gram
        self.vocabulary, self.seconds_per_frame, self.arguments = vocabulary, seconds_per_frame, arguments
        self.tokens = [token for token, piece in enumerate(vocabulary.pieces) if piece is not None]
        lower = getattr(vocabulary.tokenizer, "do_lower_case", False)
        pieces = [vocabulary.pieces[token] for token in self.tokens]
        pieces = [piece.lower() for piece in pieces] if lower else pieces
        is_subword = any(piece.startswith(WORD_START) for piece in pieces)
        self.spelling: dict[str, list[int]] = {}  # tokens of a piece
        for token, piece in zip(self.tokens, pieces):
            self.spelling.setdefault(piece, []).append(token)
        self.word_start = WORD_START if is_subword else ""
        self.longest_piece = max(map(len, pieces))
        characters = set("".join(pieces))
        for word in arguments.hot_words:
            if unknown := sorted(set(word) - characters - {" "}):
                raise ValueError(
                    f"hot_words: the model cannot write {' '.join(unknown)} of {word!r}; it has "
                    f"{' '.join(sorted(characters - {' ', WORD_START}))}"
                )
        language_model = None
        if arguments.lm is not None:
            words = read_words(arguments.lm)
            if words is not None and not any(set(word) <= characters for word in words):
                raise ValueError(
                    f"lm: the model cannot write a single word of {arguments.lm}, such as {min(words)!r}: build it "
                    "from texts in the spelling that the model writes (case, script)"
                )
            if words is None:
                logger.warning(
                    "lm: %s is no ARPA file, and its words are not known: none is judged before it is whole",
                    arguments.lm,
                )
            config = kenlm.Config()
            config.show_progress = False
            ngram = kenlm.Model(arguments.lm, config)
            unknown = {word for phrase in arguments.hot_words for word in phrase.split() if word not in ngram}

            class WithHotWords(LanguageModel):
                def score(self, prev_state, word, is_last_word=False):
                    if not word:  # of a hypothesis that ends between words, or has none
                        end = self._get_raw_end_score(prev_state) if is_last_word else 0.0
                        return self.alpha * end * math.log(10), prev_state
                    score, state = super().score(prev_state, word, is_last_word)
                    if word in unknown:  # spared what other words pay that the n-gram does not know
                        score -= self.alpha * self.unk_score_offset * math.log(10)
                    return score, state

                def score_partial_token(self, partial_token):
                    return 0.0 if words is None else super().score_partial_token(partial_token)

            language_model = WithHotWords(ngram, words, alpha=arguments.lm_weight, beta=arguments.word_bonus)
        labels = [_WordStart(piece) if piece == WORD_START else piece for piece in pieces]
        self.search = BeamSearchDecoderCTC(Alphabet(["", *labels], is_subword), language_model)

    def __del__(self):
        if hasattr(self, "search"):
            self.search.cleanup()  # it holds the n-gram in a table of its class

    def decode(self, log_probs: np.ndarray) -> Transcript:
        """Transcribe (T, V) float32 log-posteriors of the tokens in every frame."""
        if len(log_probs) == 0:
            return _transcript([])
        silent = np.setdiff1d(np.arange(log_probs.shape[1]), self.tokens)
        blank = np.logaddexp.reduce(log_probs[:, silent], axis=1, keepdims=True)
        beams = self.search.decode_beams(
            np.concatenate([blank, log_probs[:, self.tokens]], axis=1),
            beam_width=self.arguments.beam_width,
            hotwords=self.arguments.hot_words,
            hotword_weight=self.arguments.hot_word_weight,
        )
        between = blank[:, 0]
        for token in self.spelling.get(" ", ()):
            between = np.maximum(between, log_probs[:, token])
        found = beams[0][2]
        words, left = [], 0
        for (text, (start, end)), (_, (following, _)) in zip(found, [*found[1:], (None, (len(log_probs), None))]):
            # Where beams met, the search keeps the frames of one of them: the word may begin or end a little outside.
            left = max(left, start - ALIGNMENT_MARGIN)
            right = max(end, min(following, end + ALIGNMENT_MARGIN))
            frames = slice(left, right)
            tokens = [
                (token, left + first, left + last)
                for token, first, last in self._align(
                    text, log_probs[frames], blank[frames, 0], between[frames], is_first=not words
                )
            ]
            words.append(_word(text, tokens, log_probs, self.seconds_per_frame))
            left = tokens[-1][2]
        return _transcript(words)

    def _align(
        self, word: str, log_probs: np.ndarray, blank: np.ndarray, between: np.ndarray, is_first: bool = False
    ) -> list[tuple[int, int, int]]:
        """The most probable tokens that spell a word, each with its first frame and last frame + 1.

        Args:
            log_probs, blank: (T, V) and (T,), around the word.
            between: (T,) log-probability of what stands between words.
            is_first: of the text, which may begin without "▁".
        """
        text = self.word_start + word
        begins = {0, len(self.word_start)} if is_first else {0}
        states: list[tuple[int | None, int, int]] = [(None, begin, begin) for begin in range(len(text) + 1)]
        for begin in range(len(text)):
            for end in range(begin + 1, min(begin + self.longest_piece, len(text)) + 1):
                states += [(token, begin, end) for token in self.spelling.get(text[begin:end], ())]
        # state -> those before it: itself; a blank before a token; the token or a blank of the same place; a token
        # right after another one.
        reaching: dict[int, list[int]] = {}
        for state, (_, _, end) in enumerate(states):
            reaching.setdefault(end, []).append(state)
        lists = []
        for state, (token, begin, _) in enumerate(states):
            options = {state}
            for other in reaching.get(begin, ()):
                previous = states[other][0]
                if (previous != token) if previous is not None else (token is not None):
                    options.add(other)
            lists.append(sorted(options))
        most = max(map(len, lists))
        before = np.array([options + [options[-1]] * (most - len(options)) for options in lists])  # (S, most)
        emission = np.stack([blank if token is None else log_probs[:, token] for token, _, _ in states], axis=1)
        emission[:, [0, len(text)]] = between[:, None]
        emission = np.maximum(emission, MIN_LOG_PROB)
        score = np.where([begin in begins for _, begin, _ in states], emission[0], -np.inf)
        pointers = []
        every = np.arange(len(states))
        for frame in emission[1:]:
            pointers.append(before[every, score[before].argmax(1)])
            score = score[pointers[-1]] + frame
        ends = [state for state, (_, _, end) in enumerate(states) if end == len(text)]
        path = [max(ends, key=score.__getitem__)]
        for pointer in reversed(pointers):
            path.append(pointer[path[-1]])
        path.reverse()
        starts = [frame for frame, state in enumerate(path) if frame == 0 or state != path[frame - 1]]
        return [
            (states[path[start]][0], start, end)
            for start, end in zip(starts, [*starts[1:], len(path)])
            if states[path[start]][0] is not None
        ]


def _word(text: str, tokens: list[tuple[int, int, int]], log_probs: np.ndarray, seconds_per_frame: float) -> Word:
    """A word of its tokens, each with its first frame and last frame + 1.

    A token is as sure as its highest posterior among its frames, a word as its tokens on average.
    """
    confidence = np.mean([np.exp(log_probs[start:end, token].max()) for token, start, end in tokens])
    start, end = tokens[0][1], tokens[-1][2]
    return Word(text, float(start * seconds_per_frame), float(end * seconds_per_frame), float(confidence))


def join_transcripts(transcripts: Iterable[Transcript]) -> Transcript:
    """One transcript of several, in their order; it tells words if each of them does."""
    transcripts = list(transcripts)
    if all(transcript.words is not None for transcript in transcripts):
        return _transcript([word for transcript in transcripts for word in transcript.words])
    return Transcript(" ".join(transcript.text for transcript in transcripts if transcript.text), None, None)


def _transcript(words: list[Word]) -> Transcript:
    """The transcript of words in their order, as sure as they are on average."""
    confidence = float(np.mean([word.confidence for word in words])) if words else None
    return Transcript(" ".join(word.text for word in words), words, confidence)
