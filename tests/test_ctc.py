"""Text policy, vocabularies, pre-flight check and error rates."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from hf_speechcl import load_demo
from hf_speechcl.ctc import build_processor, preflight
from hf_speechcl.evaluation.asr import SpeechErrorRates, bootstrap_interval, edit_counts
from hf_speechcl.text import normalize_text
from hf_speechcl.text_policy import TextPolicy, apply_policy, spell_numbers


def frames(samples: int) -> int:
    return -(-samples // 640)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Please hold, won't you?", "please hold won't you"),
        ("It’s  4\to'clock.", "it's 4 o'clock"),
        ("'quoted' words'", "quoted words"),
        ("ÄPFEL – Ｆｕｌｌ", "äpfel full"),
        ("हिन्दी", "हिन्दी"),
        ("...", ""),
        ("می\u200cخواهم", "میخواهم"),
        ("co\u00adoperate", "cooperate"),
        ("ភាសា\u200bខ្មែរ", "ភាសា ខ្មែរ"),
        ("G\u0303'a", "g\u0303'a"),
        ("geht´s ¨", "geht's"),
    ],
)
def test_basic_normalization(text, expected):
    assert normalize_text(text) == expected


def test_no_normalization_collapses_white_space_only():
    assert normalize_text(" Hold,  PLEASE\n", "none") == "Hold, PLEASE"
    with pytest.raises(ValueError, match="'upper': expected none, basic, whisper_english"):
        normalize_text("a", "upper")


def test_processor_encodes_the_training_characters_and_decodes_them_back():
    processor = build_processor(["hello world", "it's 4"], 16000)
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token_id == 0
    assert len(tokenizer) == 3 + len(set("hello world" + "it's 4") - {" "})
    ids = tokenizer("hello it's 4").input_ids
    assert ids[0] == tokenizer.convert_tokens_to_ids("h")
    assert tokenizer.convert_tokens_to_ids("|") in ids
    assert tokenizer.unk_token_id not in ids
    with_blanks = [token for token in ids for token in (token, 0)]
    assert tokenizer.decode(with_blanks) == "hello it's 4"
    assert processor.feature_extractor.do_normalize is False


def test_processor_without_characters_is_refused():
    with pytest.raises(ValueError, match="no characters"):
        build_processor(["", " "], 16000)


@pytest.fixture(scope="module")
def demo_texts():
    return [normalize_text(text) for text in load_demo()["train"]["text"]]


@pytest.mark.parametrize("vocabulary", ["unigram", "bpe"])
def test_pieces_encode_any_training_text_and_decode_it_back_by_stock_classes(vocabulary, demo_texts, tmp_path):
    build_processor(demo_texts, 16000, vocabulary, 100).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    tokenizer = processor.tokenizer
    assert type(tokenizer).__module__.startswith("transformers.")
    assert (len(tokenizer), tokenizer.pad_token_id) == (100, 0)
    labels = tokenizer(demo_texts).input_ids
    assert sum(map(len, labels)) < 0.7 * sum(map(len, demo_texts))
    assert not any({tokenizer.pad_token_id, tokenizer.unk_token_id} & set(ids) for ids in labels)
    # As a model would write them: every piece on two frames, a blank after it.
    frames_of = [[token for piece in ids for token in (piece, piece, 0)] for ids in labels]
    assert processor.batch_decode(frames_of) == demo_texts
    assert [tokenizer.decode(np.array(ids)) for ids in frames_of[:5]] == demo_texts[:5]


def test_vocabulary_size_that_cannot_be_is_refused_or_logged(demo_texts, caplog):
    with pytest.raises(
        ValueError, match=r"vocab_size=20 has no room for the 3\d characters .* raise it to 4\d at least"
    ):
        build_processor(demo_texts, 16000, "unigram", 20)
    processor = build_processor(["one two", "two one"], 16000, "bpe", 500)
    assert f"the training texts have {len(processor.tokenizer)} bpe pieces, fewer than vocab_size=500" in caplog.text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_default_policy_is_the_basic_normalisation_and_keeping_all_is_none(text):
    assert TextPolicy()(text) == normalize_text(text)
    assert TextPolicy(casing="keep", punctuation="keep")(text) == normalize_text(text, "none")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "it's 4 o'clock mr smith"),
        ({"casing": "upper"}, "IT'S 4 O'CLOCK MR SMITH"),
        ({"casing": "keep"}, "It's 4 o'clock Mr Smith"),
        ({"punctuation": "keep"}, "it’s 4 o'clock, mr. smith!"),
        ({"casing": "keep", "punctuation": "keep", "digits": "words"}, "It’s four o'clock, Mr. Smith!"),
        ({"casing": "upper", "digits": "words"}, "IT'S FOUR O'CLOCK MR SMITH"),
    ],
)
def test_text_policy(options, expected):
    assert TextPolicy(**options)(" It’s 4  o'clock, Mr. Smith!") == expected


def test_clips_with_digits_may_be_left_out():
    policy = TextPolicy(digits="leave_out")
    assert [policy.leaves_out(text) for text in ("press 4", "press four", "½ way", "٣")] == [True, False, True, True]
    assert not TextPolicy().leaves_out("press 4")
    spelled = TextPolicy(digits="words")
    assert [spelled.leaves_out(text) for text in ("press 4", "1½ hours", "5² metres")] == [False, True, True]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("en", "1,200 of 12", "one thousand, two hundred of twelve"),
        ("en", "the 3rd, 3.5 at 007", "the third, three point five at zero zero seven"),
        ("en", "1.50, 2.0", "one point five zero, two point zero"),
        ("ru", "5,0", "пять целых ноль десятых"),
        ("es_GT", "1,200.5", "mil doscientos punto cinco"),
        ("pl", "3,50", "trzy przecinek pięćdziesiąt"),  # not digit by digit
        ("tet", "1.200", "rihun ida atus rua"),
        ("tr", "5,25", "beşvirgülyirmibeş"),
        ("it", "2,5", "due virgola cinque"),
        ("bn", "0.05", "শূন্য শূন্য পাঁচ"),  # num2words says the same for 0.5
        ("en", "x2y 1,2", "x two y one,two"),
        ("en", "4TH of", "fourth of"),
        ("am", "1999", " ".join(spell_numbers(digit, "am") for digit in "1999")),  # num2words fails
        ("de", "1.200 und 3,5", "eintausendzweihundert und drei Komma fünf"),
    ],
)
def test_numbers_in_words(language, text, expected):
    assert spell_numbers(text, language) == expected


def test_number_too_long_for_words_is_read_digit_by_digit():
    assert spell_numbers("9" * 400) == " ".join(["nine"] * 400)


def test_text_report_counts_rules_and_shows_examples(tmp_path):
    texts, report = apply_policy(TextPolicy(digits="words"), ["Press 4!", None, "hold", "HOLD  on", "a 5"])
    assert texts == ["press four", None, "hold", "hold on", "a five"]
    assert report.num_texts == 4
    assert report.counts == {"white space": 1, "digits": 2, "casing": 2, "punctuation": 1}
    assert report.examples["punctuation"] == [{"before": "press four!", "after": "press four"}]
    assert "digits: 2 of 4 texts, such as 'a 5' → 'a five'; 'Press 4!' → 'Press four!'" in str(report)
    report.save(tmp_path / "text.json")
    assert json.loads((tmp_path / "text.json").read_text())["policy"]["digits"] == "words"
    assert str(apply_policy(TextPolicy(), ["a b"])[1]) == "texts: all 1 stay as they are"


def test_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="punctuation must be remove, keep, found 'some'"):
        TextPolicy(punctuation="some")
    with pytest.raises(ValueError, match="text_language: num2words does not know 'xx', it knows"):
        TextPolicy(digits="words", language="xx")


def test_preflight_names_every_clip_and_its_reason(tmp_path):
    rows = [
        ("good", 2.0, "hello"),
        ("none", 1.0, None),
        ("empty", 1.0, ""),
        ("foreign", 3.0, "hé"),
        ("pipe", 1.0, "h|e"),
        ("blank", 1.0, "h[PAD]e"),
        ("long", 20.0, "hello"),
        ("crowded", 0.2, "hello"),  # 5 frames, 5 labels, 1 repeat
        ("just_enough", 0.24, "hello"),
    ]
    names, durations, texts = map(list, zip(*rows))
    corpus = Dataset.from_dict({"id": names, "duration": durations})
    tokenizer = build_processor(["hello"], 16000).tokenizer
    kept, labels, report = preflight(corpus, texts, tokenizer, frames, 16000, max_seconds=10)
    assert [names[row] for row in kept] == ["good", "just_enough"]
    assert labels == [tokenizer("hello").input_ids] * 2
    reasons = {problem["id"]: (problem["reason"], problem["detail"]) for problem in report.problems}
    assert reasons == {
        "none": ("no text", "None"),
        "empty": ("empty text", "nothing is left after normalisation"),
        "foreign": ("characters outside the vocabulary", "é"),
        "pipe": ("characters outside the vocabulary", "|"),
        "blank": ("characters outside the vocabulary", "[PAD]"),
        "long": ("too long", "20.0 s > 10 s"),
        "crowded": ("too short for its text", "5 frames < 5 labels + 1 repeats"),
    }
    assert "7 of 9 clips (0.008 of 0.01 h) are left out" in str(report)
    assert "too long: 1 clips, 0.006 h, such as long (20.0 s > 10 s)" in str(report)
    report.save(tmp_path / "preflight.json")
    assert len(json.loads((tmp_path / "preflight.json").read_text())["problems"]) == 7


def test_preflight_counts_pieces_and_their_repeats():
    tokenizer = build_processor(["so so so so no no"] * 5, 16000, "bpe", 20).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("so so no").input_ids) == ["▁so", "▁so", "▁no"]
    texts = ["so so no"] * 2 + ["so s▁o", "so ex", "[PAD] so", "no"]
    corpus = Dataset.from_dict({"id": list("abcdef"), "duration": [0.12, 0.16, 1.0, 1.0, 1.0, 1.0]})
    kept, labels, report = preflight(corpus, texts, tokenizer, frames, 16000, left_out={5: ("digits", "no. 5")})
    assert kept == [1]
    assert labels == [tokenizer("so so no").input_ids]
    assert [(problem["reason"], problem["detail"]) for problem in report.problems] == [
        ("too short for its text", "3 frames < 3 labels + 1 repeats"),
        ("characters outside the vocabulary", "▁"),
        ("characters outside the vocabulary", "e x"),
        ("characters outside the vocabulary", "[PAD]"),
        ("digits", "no. 5"),
    ]


def test_error_rates_of_known_texts():
    references = ["the cat sat", "on the mat", "yes"]
    hypotheses = ["the bat sat", "on mat now", ""]
    assert edit_counts(references, hypotheses).tolist() == [[1, 3], [2, 3], [1, 1]]
    rates = SpeechErrorRates().compute(predictions=hypotheses, references=references)
    assert rates["wer"] == pytest.approx(4 / 7)
    assert rates["cer"] == pytest.approx(edit_counts(references, hypotheses, True)[:, 0].sum() / (11 + 10 + 3))
    assert rates["wer_low"] <= rates["wer"] <= rates["wer_high"]


def test_perfect_and_empty_transcripts():
    rates = SpeechErrorRates().compute(predictions=["a b", "c"], references=["a b", "c"])
    assert (rates["wer"], rates["wer_low"], rates["wer_high"], rates["cer"]) == (0, 0, 0, 0)
    assert SpeechErrorRates().compute(predictions=["", ""], references=["a b", "c"])["wer"] == 1
    with pytest.raises(ValueError, match="all references are empty"):
        SpeechErrorRates().compute(predictions=["a"], references=[""])


def test_bootstrap_interval_covers_a_known_error_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        counts = np.stack([rng.binomial(10, 0.3, size=80), np.full(80, 10)], axis=1)
        low, high = bootstrap_interval(counts, seed=trial)
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 100
