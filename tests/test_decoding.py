"""Decoders, alone and with an n-gram."""

import itertools
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ParakeetTokenizer

from hf_speechcl.ctc import build_processor
from hf_speechcl.decoding import DecodingArguments, Transcript, build_decoder, join_transcripts
from hf_speechcl.language_model import estimate
from tests.conftest import SENTENCES, kenlm, needs_lm

GREEDY_AND_BEAM = [
    pytest.param(DecodingArguments(), id="greedy"),
    pytest.param(DecodingArguments(beam_width=10), id="beam", marks=needs_lm),
]


def characters():
    return build_processor(["the cat sat on a mat dog's"], 16000).tokenizer


def pieces():
    names = ["[PAD]", "[UNK]", "▁", "▁the", "▁c", "at", "a", "t", "▁s", "▁m", "s", "▁on", "▁t", "he"]
    tokenizer = Tokenizer(models.Unigram([(name, -1.0 - 0.1 * rank) for rank, name in enumerate(names)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    return ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


TOKENIZERS = {"characters": characters, "pieces": pieces}


def sure_of(tokenizer, tokens: list[str], confidence: float = 0.9) -> np.ndarray:
    """Log-posteriors (T, V) that give each of the tokens a frame."""
    ids = tokenizer.convert_tokens_to_ids(tokens)
    probs = np.full((len(ids), len(tokenizer)), (1 - confidence) / (len(tokenizer) - 1), np.float32)
    probs[np.arange(len(ids)), ids] = confidence
    return np.log(probs)


def random_log_probs(size: int, seed: int, frames: int = 60) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 3, (frames, size)).astype(np.float32)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(8))
def test_greedy_text_is_that_of_the_tokenizer_without_special_tokens(name, seed):
    tokenizer = TOKENIZERS[name]()
    log_probs = random_log_probs(len(tokenizer) + 2, seed)  # outputs beyond the vocabulary mean nothing
    log_probs[:, len(tokenizer) :] -= 50
    expected = tokenizer.decode(log_probs.argmax(-1).tolist()).replace("[UNK]", "")
    transcript = build_decoder(tokenizer, 0.02, DecodingArguments()).decode(log_probs)
    assert transcript.text == " ".join(expected.split())
    assert transcript.text == " ".join(word.text for word in transcript.words)
    times = [time for word in transcript.words for time in (word.start, word.end)]
    assert times == sorted(times)
    assert all(0 < word.confidence <= 1 and word.start < word.end <= 60 * 0.02 for word in transcript.words)


@pytest.mark.parametrize("arguments", GREEDY_AND_BEAM)
def test_words_have_the_times_and_posteriors_of_their_tokens(arguments):
    tokenizer = characters()
    log_probs = sure_of(tokenizer, "[PAD] c c a [PAD] t | | [PAD] o [UNK] n [PAD]".split())
    log_probs[3] = sure_of(tokenizer, ["a"], 0.6)[0]
    transcript = build_decoder(tokenizer, 0.04, arguments).decode(log_probs)
    assert transcript.text == "cat on"
    spans = [(word.text, pytest.approx(word.start), pytest.approx(word.end)) for word in transcript.words]
    assert spans == [("cat", 0.04, 0.24), ("on", 0.36, 0.48)]
    assert [word.confidence for word in transcript.words] == pytest.approx([(0.9 + 0.6 + 0.9) / 3, 0.9])
    assert transcript.confidence == pytest.approx((0.8 + 0.9) / 2)


@pytest.mark.parametrize("arguments", GREEDY_AND_BEAM)
def test_silence_is_an_empty_transcript(arguments):
    decoder = build_decoder(characters(), 0.04, arguments)
    for log_probs in (sure_of(characters(), ["[PAD]"] * 5), np.zeros((0, len(characters())), np.float32)):
        transcript = decoder.decode(log_probs)
        assert (transcript.text, transcript.words, transcript.confidence) == ("", [], None)


@needs_lm
@pytest.mark.parametrize("name", TOKENIZERS)
def test_beam_search_without_lm_agrees_with_greedy_where_the_model_is_sure(name):
    tokenizer = TOKENIZERS[name]()
    text = "the cat sat on a mat" if name == "characters" else "the cat sat on a mat at the"
    tokens = [token for token in tokenizer.tokenize(text) for token in (token, token, "[PAD]")]
    log_probs = sure_of(tokenizer, tokens, 0.99)
    greedy = build_decoder(tokenizer, 0.02, DecodingArguments()).decode(log_probs)
    beam = build_decoder(tokenizer, 0.02, DecodingArguments(beam_width=20)).decode(log_probs)
    assert greedy.text == beam.text == text
    assert beam == greedy


@needs_lm
def test_beam_search_sums_over_alignments_where_greedy_takes_the_best_frames():
    """Two frames, blank 0.6 and a 0.4 in each: "a" has 0.64, nothing 0.36 (Graves et al. 2006, section 3.2)."""
    tokenizer = characters()
    probs = np.full((2, len(tokenizer)), 1e-9, np.float32)
    probs[:, tokenizer.pad_token_id], probs[:, tokenizer.convert_tokens_to_ids("a")] = 0.6, 0.4
    assert build_decoder(tokenizer, 1, DecodingArguments()).decode(np.log(probs)).text == ""
    assert build_decoder(tokenizer, 1, DecodingArguments(beam_width=5)).decode(np.log(probs)).text == "a"


@needs_lm
@pytest.mark.parametrize("seed", range(4))
def test_alignment_of_a_word_is_the_best_of_all(seed):
    tokenizer = pieces()
    decoder = build_decoder(tokenizer, 1, DecodingArguments(beam_width=5))
    log_probs = random_log_probs(len(tokenizer), seed, frames=4)
    blank = tokenizer.pad_token_id
    found = decoder._align("cat", log_probs, log_probs[:, blank], log_probs[:, blank])
    tokens = [token for token in range(len(tokenizer)) if (decoder.vocabulary.pieces[token] or "x") in "▁cat"]
    best = max(
        (path for path in itertools.product([blank, *tokens], repeat=4) if tokenizer.decode(list(path)) == "cat"),
        key=lambda path: sum(log_probs[frame, token] for frame, token in enumerate(path)),
    )
    runs, frame = [], 0
    for token, run in itertools.groupby(best):
        length = len(list(run))
        if token != blank:
            runs.append((token, frame, frame + length))
        frame += length
    assert found == runs


@needs_lm
@pytest.mark.parametrize("with_lm", [False, True])
@pytest.mark.parametrize("vocabulary", ["unigram", "bpe"])
def test_words_of_any_posteriors_have_times_in_order(vocabulary, with_lm, tmp_path):
    tokenizer = build_processor([" ".join(words) for words in SENTENCES], 16000, vocabulary, 24).tokenizer
    estimate(SENTENCES, 2).save(tmp_path / "lm.arpa")
    arguments = DecodingArguments(beam_width=10, lm=str(tmp_path / "lm.arpa") if with_lm else None)
    decoder = build_decoder(tokenizer, 1, arguments)
    num_continued = 0
    for seed in range(150):
        frames = (1, 2, 3, 5, 8, 60)[seed % 6]
        log_probs = random_log_probs(len(tokenizer), seed, frames)
        if seed % 4 == 0:
            log_probs[log_probs < -5] = -np.inf
        words = decoder.decode(log_probs).words
        times = [time for word in words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert all(0 <= word.start < word.end <= frames and 0 <= word.confidence <= 1 for word in words), seed
        first = tokenizer.convert_ids_to_tokens(int(log_probs[0].argmax()))
        num_continued += bool(words) and not first.startswith("▁")
    assert num_continued > 10


@needs_lm
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["t"], [("t", 0, 1)]),
        (["[PAD]", "he", "[PAD]", "▁the"], [("he", 1, 2), ("the", 3, 4)]),
        (["▁", "he", "[PAD]", "▁the"], [("he", 0, 2), ("the", 3, 4)]),
    ],
)
def test_the_first_word_may_begin_without_a_word_start(tokens, expected):
    tokenizer = pieces()
    transcript = build_decoder(tokenizer, 1, DecodingArguments(beam_width=10)).decode(sure_of(tokenizer, tokens))
    assert [(word.text, word.start, word.end) for word in transcript.words] == expected
    assert transcript.confidence == pytest.approx(0.9)


@needs_lm
def test_an_unlikely_word_start_breaks_no_word():
    tokenizer = pieces()
    log_probs = sure_of(tokenizer, ["▁c", "a", "t", "s", "[PAD]"], 0.95)
    log_probs[:, tokenizer.convert_tokens_to_ids("▁")] = np.log(0.04)
    assert build_decoder(tokenizer, 1, DecodingArguments(beam_width=10)).decode(log_probs).text == "cats"


@needs_lm
def test_ngram_and_hot_words_decide_where_the_model_is_in_doubt(tmp_path):
    estimate(SENTENCES, 3).save(tmp_path / "lm.arpa")
    tokenizer = characters()
    log_probs = sure_of(tokenizer, "t h e | c a t | s a t | o n | t h e | m a t".split(), 0.9)
    doubt = [[tokenizer.convert_tokens_to_ids(token) for token in "c d".split()], [0.48, 0.5]]
    log_probs[19] = np.log(0.02 / len(tokenizer))
    log_probs[19, doubt[0]] = np.log(doubt[1])  # "dat", and "cat" a little less
    lm = {"beam_width": 50, "lm": str(tmp_path / "lm.arpa")}

    def text(**options):
        return build_decoder(tokenizer, 0.04, DecodingArguments(**options)).decode(log_probs).text

    assert text() == text(beam_width=50) == "the cat sat on the dat"
    assert text(**lm) == "the cat sat on the cat"
    assert text(beam_width=50, hot_words=["cat"], hot_word_weight=3) == "the cat sat on the cat"
    assert text(**lm, hot_words=["dat"], hot_word_weight=5) == "the cat sat on the dat"


def sum_over_paths(log_probs, tokens, blank, text_of_path):
    """Probability of every text, by all paths."""
    found = {}
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        kept = [token for token, _ in itertools.groupby(path) if token != blank]
        text = text_of_path([tokens[token] for token in kept])
        score = sum(log_probs[frame, token] for frame, token in enumerate(path))
        found[text] = np.logaddexp(found.get(text, -np.inf), score)
    return found


@needs_lm
@pytest.mark.parametrize("is_binary", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_beam_search_with_an_ngram_finds_the_best_of_all_texts(seed, is_binary, tmp_path, monkeypatch):
    if is_binary:  # whose words cannot be listed
        monkeypatch.setattr("hf_speechcl.decoding.read_words", lambda file: None)
    estimate([["a"], ["b", "a"], ["ab"], ["a", "b"], ["a"]], 2).save(tmp_path / "lm.arpa")
    tokenizer = build_processor(["a b"], 16000).tokenizer
    used = tokenizer.convert_tokens_to_ids(["[PAD]", "a", "b", "|"])
    log_probs = np.full((5, len(tokenizer)), -100.0, np.float32)
    probs = np.random.default_rng(seed).dirichlet([0.5] * 4, size=5) + 0.02  # less is not searched
    log_probs[:, used] = np.log(probs / probs.sum(axis=1, keepdims=True))
    weight, bonus, model = 0.5, 1.5, kenlm.Model(str(tmp_path / "lm.arpa"))
    found = sum_over_paths(log_probs[:, used], ["", "a", "b", " "], 0, lambda pieces: " ".join("".join(pieces).split()))
    scores = {
        text: score
        + weight * math.log(10) * (model.score(text) - 10 * sum(word not in model for word in text.split()))
        + bonus * len(text.split())
        for text, score in found.items()
    }
    options = DecodingArguments(beam_width=500, lm=str(tmp_path / "lm.arpa"), lm_weight=weight, word_bonus=bonus)
    text = build_decoder(tokenizer, 1, options).decode(log_probs).text
    assert scores[text] == pytest.approx(max(scores.values()), abs=1e-3)


@needs_lm
def test_an_ngram_makes_no_words_of_silence(tmp_path):
    estimate(SENTENCES, 3).save(tmp_path / "lm.arpa")
    tokenizer = characters()
    options = DecodingArguments(beam_width=50, lm=str(tmp_path / "lm.arpa"))
    log_probs = sure_of(tokenizer, "t h e | c a t |".split() + ["[PAD]"] * 20, 0.96)
    log_probs[:8] = sure_of(tokenizer, "t h e | c a t |".split(), 0.999)
    log_probs[12, tokenizer.convert_tokens_to_ids("a")] = np.log(0.01)
    assert build_decoder(tokenizer, 1, options).decode(log_probs).text == "the cat"
    assert build_decoder(tokenizer, 1, options).decode(log_probs[8:]).text == ""


@needs_lm
def test_wrong_decoding_options_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="lm needs beam search: set beam_width"):
        DecodingArguments(lm="lm.arpa")
    with pytest.raises(FileNotFoundError, match="lm: no file"):
        DecodingArguments(beam_width=2, lm=str(tmp_path / "lm.arpa"))
    with pytest.raises(ValueError, match="cannot write C of 'Cat'"):
        build_decoder(characters(), 0.04, DecodingArguments(beam_width=2, hot_words=["Cat"]))
    estimate([["CAT"]], 2).save(tmp_path / "upper.arpa")
    with pytest.raises(ValueError, match="cannot write a single word of .*upper.arpa, such as 'CAT'"):
        build_decoder(characters(), 0.04, DecodingArguments(beam_width=2, lm=str(tmp_path / "upper.arpa")))


def test_missing_packages_are_named_with_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyctcdecode", None)
    with pytest.raises(ImportError, match="pip install --no-deps pyctcdecode"):
        build_decoder(characters(), 0.04, DecodingArguments(beam_width=2))


def test_joined_transcripts_tell_words_if_all_parts_do():
    decoder = build_decoder(characters(), 0.04, DecodingArguments())
    parts = [decoder.decode(sure_of(characters(), list(word))) for word in ("cat", "on")]
    assert join_transcripts(parts).text == "cat on"
    assert join_transcripts(parts).confidence == pytest.approx(0.9)
    assert join_transcripts([]).text == ""
    assert join_transcripts([parts[0], Transcript("x", None, None)]) == Transcript("cat x", None, None)
