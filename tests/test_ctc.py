"""Vocabulary, normalisation, pre-flight check and error rates."""

import json

import numpy as np
import pytest
from datasets import Dataset

from hf_speechcl.ctc import build_processor, preflight
from hf_speechcl.evaluation.asr import SpeechErrorRates, bootstrap_interval, edit_counts
from hf_speechcl.text import normalize_text


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
    kept, report = preflight(corpus, texts, tokenizer, frames, 16000, max_seconds=10)
    assert [names[row] for row in kept] == ["good", "just_enough"]
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
