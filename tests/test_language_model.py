"""N-grams and the command that builds them."""

import functools
import gzip
import itertools
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet
import pytest

from hf_speechcl import text_policy
from hf_speechcl.language_model import LanguageModelArguments, estimate, main, read_words, text_policy_of
from hf_speechcl.text_policy import TextPolicy
from tests.conftest import SENTENCES, kenlm, needs_lm


class PlainKneserNey:
    """P(word | context) as Chen and Goodman 1998 write it, by counting anew for every value."""

    def __init__(self, sentences: list[list[str]], order: int):
        self.lines, self.order = [["<s>", *sentence, "</s>"] for sentence in sentences], order
        self.vocabulary = sorted({token for line in self.lines for token in line} - {"<s>"})
        self.count, self.discounts = functools.cache(self._count), functools.cache(self._discounts)

    def _count(self, ngram):
        def occurrences(ngram):
            return sum(
                tuple(line[i : i + len(ngram)]) == ngram
                for line in self.lines
                for i in range(len(line) - len(ngram) + 1)
            )

        if len(ngram) == self.order or ngram[0] == "<s>":
            return occurrences(ngram)
        return sum(occurrences((before, *ngram)) > 0 for before in ["<s>", *self.vocabulary])

    def _discounts(self, length):
        starts = itertools.product(["<s>", *self.vocabulary], *[self.vocabulary] * (length - 1))
        seen = Counter(self.count(ngram) for ngram in starts if ngram != ("<s>",))
        if not all(seen[number] for number in (1, 2, 3, 4)):
            return 0, 0.5, 1.0, 1.5
        share = seen[1] / (seen[1] + 2 * seen[2])
        return 0, *(number - (number + 1) * share * seen[number + 1] / seen[number] for number in (1, 2, 3))

    def probability(self, word, context):
        total = sum(self.count((*context, other)) for other in self.vocabulary)
        lower = self.probability(word, context[1:]) if context else 1 / (len(self.vocabulary) + 1)
        if total == 0:
            return lower

        def discount(number):
            return self.discounts(len(context) + 1)[min(number, 3)]

        freed = sum(discount(self.count((*context, other))) for other in self.vocabulary)
        number = self.count((*context, word))
        return (number - discount(number)) / total + freed / total * lower


@needs_lm
@pytest.mark.parametrize("order", [2, 3])
def test_ngram_agrees_with_a_plain_loop_and_sums_to_one(order, tmp_path):
    estimate(SENTENCES, order).save(tmp_path / "lm.arpa")
    model = kenlm.Model(str(tmp_path / "lm.arpa"))
    plain = PlainKneserNey(SENTENCES, order)
    words = read_words(tmp_path / "lm.arpa")
    assert words == {word for sentence in SENTENCES for word in sentence}
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(b"# made by hand\n\n" + (tmp_path / "lm.arpa").read_bytes()))
    assert read_words(tmp_path / "lm.arpa.gz") == words
    for history in ([], ["the"], ["the", "cat"], ["sat", "on"], ["mat", "a"], ["unheard"]):
        state = kenlm.State()
        model.BeginSentenceWrite(state)
        for word in history:
            after = kenlm.State()
            model.BaseScore(state, word, after)
            state = after
        context = tuple(["<s>", *history][-(order - 1) :])
        total = 0
        for word in [*words, "</s>", "<unk>"]:
            found = 10 ** model.BaseScore(state, word, kenlm.State())
            expected = plain.probability(word, context)
            assert found == pytest.approx(expected, rel=1e-4), (history, word)
            total += found
        assert total == pytest.approx(1, abs=1e-5)


def test_discounts_are_those_of_the_paper_where_counts_allow():
    """Words that occur once, twice, … so often that equation 26 of Chen and Goodman 1998 can be filled in by hand."""
    numbers = {1: 40, 2: 15, 3: 6, 4: 3}
    words = [f"w{count}_{rank}" for count, number in numbers.items() for rank in range(number) for _ in range(count)]
    probs = estimate([words], 1).log10_probs[0]
    assert Counter(Counter(words).values()) == numbers
    share = 41 / (41 + 2 * 15)  # </s> occurs once
    discounts = [1 - 2 * share * 15 / 41, 2 - 3 * share * 6 / 15, 3 - 4 * share * 3 / 6]
    total = len(words) + 1
    freed = (41 * discounts[0] + 15 * discounts[1] + 9 * discounts[2]) / total
    for count in (1, 2, 3, 4):
        expected = (count - discounts[min(count, 3) - 1]) / total + freed / (len(probs) - 1)
        assert 10 ** probs[(f"w{count}_0",)] == pytest.approx(expected)
    assert 10 ** probs[("<unk>",)] == pytest.approx(freed / (len(probs) - 1))


def test_longer_ngrams_predict_texts_like_the_trained_ones_better():
    def perplexity(order):
        ngram = estimate(SENTENCES, order)
        losses = [
            -ngram.log10_probs[order - 1][tuple(padded[i : i + order])]
            for padded in (["<s>"] * (order > 1) + sentence for sentence in SENTENCES)
            for i in range(len(padded) - order + 1)
        ]
        return 10 ** np.mean(losses)

    assert perplexity(3) < perplexity(2) < perplexity(1)


def test_marks_of_the_arpa_format_are_no_words():
    with pytest.raises(ValueError, match="<s>, which mean"):
        estimate([["a", "<s>"]], 2)
    with pytest.raises(ValueError, match="no sentences"):
        estimate([], 2)


def test_build_lm_spells_words_as_the_model_does_and_leaves_out_the_texts_to_be_scored(
    config, tmp_path, audio_folder, capsys
):
    config.text_policy = TextPolicy(casing="upper", digits="leave_out").to_dict()
    config.save_pretrained(tmp_path / "model")
    text = tmp_path / "book.txt"
    text.write_text("Something else.\nChapter 7\nTEXT, number nine\n", encoding="utf-8")
    scored = ["file_name,text", *(f"clip{number}.wav,Text number nine!" for number in range(4))]
    (audio_folder / "metadata.csv").write_text("\n".join(scored), encoding="utf-8")
    options = ["--model", tmp_path / "model", "--text_files", text, "--order", "2", "--output_file", tmp_path / "lm"]
    main([*map(str, options), "--exclude_corpus", str(audio_folder), "--exclude_splits", "train"])
    printed = capsys.readouterr().out
    assert "1 of 3 sentences are left out for their digits" in printed
    assert "1 of 2 sentences are left out, as they are texts of train" in printed
    assert read_words(tmp_path / "lm") == {"SOMETHING", "ELSE"}


def test_texts_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "old.txt").write_text("café", encoding="latin-1")
    with pytest.raises(SystemExit, match=r"error: text_files: .*old.txt is not UTF-8 text"):
        main(["--text_files", str(tmp_path / "old.txt"), "--output_file", str(tmp_path / "lm.arpa")])


def test_a_byte_order_mark_is_no_part_of_a_word(config, tmp_path):
    config.text_policy = TextPolicy(punctuation="keep").to_dict()
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("one two\n", encoding="utf-8-sig")
    options = ["--model", tmp_path / "model", "--text_files", tmp_path / "book.txt", "--output_file", tmp_path / "lm"]
    main([*map(str, options)])
    assert read_words(tmp_path / "lm") == {"one", "two"}


def test_build_lm_names_a_package_that_the_texts_of_the_model_need(config, tmp_path, monkeypatch):
    config.text_policy = {"digits": "words"}
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "book.txt").write_text("7\n")
    monkeypatch.setitem(sys.modules, "num2words", None)
    text_policy._number_speaker.cache_clear()
    options = ["--model", tmp_path / "model", "--text_files", tmp_path / "book.txt", "--output_file", tmp_path / "lm"]
    with pytest.raises(SystemExit, match="error: .*num2words"):
        main([*map(str, options)])


def test_texts_of_parquet_files_are_found_whatever_the_column_of_the_audio_is(tmp_path):
    rows = [{"speech": {"bytes": None, "path": "a.wav"}, "text": "one two", "duration": 1.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    options = ["--corpus", tmp_path, "--output_file", tmp_path / "lm", "--audio_column"]
    main([*map(str, options), "speech"])
    assert read_words(tmp_path / "lm") == {"one", "two"}
    with pytest.raises(SystemExit, match="has no column 'audio'.*set audio_column"):
        main([*map(str, options), "audio"])


def test_a_model_that_does_not_tell_what_was_done_to_its_texts_builds_no_ngram(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no text_policy"):
        text_policy_of(str(tmp_path))


def test_build_lm_leaves_out_the_texts_to_be_scored(tmp_path, audio_folder, capsys):
    text = tmp_path / "book.txt"
    text.write_text("Text, number 2!\nSomething else.\n\nText number nine\n", encoding="utf-8")
    lm = tmp_path / "sub" / "lm.arpa"
    options = ["--text_files", text, "--corpus", "demo", "--split", "validation", "--order", "2", "--output_file", lm]
    main([*map(str, options), "--exclude_corpus", str(audio_folder), "--exclude_splits", "train"])
    printed = capsys.readouterr().out
    assert "1 of 63 sentences are left out" in printed
    words = read_words(lm)
    assert {"something", "else", "nine"} <= words
    assert "book" not in words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no texts"),
        ({"corpus": ["demo"], "order": 7}, "order must be 2 to 6"),
        ({"text_files": ["x"]}, "no file x"),
    ],
)
def test_wrong_ngram_options_are_refused(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LanguageModelArguments(**options)
