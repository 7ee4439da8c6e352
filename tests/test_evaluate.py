"""Scoring: error rates and their comparison, slices, runs that go on, the report, and wrong options."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from hf_speechcl import SpeechDataset, load_corpus
from hf_speechcl.ctc import build_processor
from hf_speechcl.evaluation.asr import (
    align,
    bootstrap_interval,
    edit_counts,
    frequent_errors,
    name_bins,
    paired_bootstrap,
    slice_rates,
)
from hf_speechcl.evaluation.comparison import compare
from hf_speechcl.evaluation.evaluate import main as evaluate
from hf_speechcl.evaluation.report import histogram
from hf_speechcl.evaluation.transcription import TranscriptLog, estimate_snr, transcribe
from hf_speechcl.recognizer import SpeechRecognizer, Transcript
from hf_speechcl.text import normalize_text

HOSTILE = "<script>alert(1)</script> \"><img src=x onerror='alert(2)'> & {{7*7}}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random-weight Wav2Vec2ForCTC with its processor."""
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    processor = build_processor(["the quick brown fox <jumps>"], 16000)
    config = Wav2Vec2Config(
        vocab_size=len(processor.tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8, 8), conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8),
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, num_feat_extract_layers=3,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def labelled_folder(audio_folder):
    """Four clips with texts and speakers; one text is hostile."""
    lines = [f'clip{n}.wav,"{text}",{who}' for n, (text, who) in enumerate(TEXTS)]
    (audio_folder / "metadata.csv").write_text("\n".join(["file_name,text,speaker", *lines]))
    return audio_folder


TEXTS = [("hello there", "ann"), (HOSTILE.replace('"', '""'), "<b>bob</b>"), ("good morning", "ann"), ("yes", "bob")]


class CountingRecognizer:
    """Says how many samples it heard, and can be told to break down."""

    sampling_rate, kind = 16000, "ctc"

    def __init__(self, clips_before_breakdown=None):
        self.heard, self.limit = 0, clips_before_breakdown

    def transcribe(self, waveforms):
        if self.limit is not None and self.heard >= self.limit:
            raise KeyboardInterrupt
        self.heard += len(waveforms)
        return [Transcript(f"{len(waveform)} samples", None, None) for waveform in waveforms]

    def transcribe_recording(self, audio, recording):
        return Transcript("a recording", None, None)


class PageParser(HTMLParser):
    """What a browser makes of a page: its tags, the values of its attributes, and its text."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = set(), {}, ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)

    def handle_data(self, data):
        self.text += data


def run(model, corpus, *arguments):
    common = ["--model", model, "--corpus", corpus, "--split", "train", "--device", "cpu", *arguments]
    evaluate([str(argument) for argument in common])


# Error rates


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_aligned_words_are_those_of_both_texts_with_as_few_errors_as_are_counted(reference, hypothesis):
    pairs = align(" ".join(reference), " ".join(hypothesis))
    assert [left for left, _ in pairs if left is not None] == reference
    assert [right for _, right in pairs if right is not None] == hypothesis
    [[errors, _]] = edit_counts([" ".join(reference)], [" ".join(hypothesis)]).tolist()
    assert sum(left != right for left, right in pairs) == errors


def test_frequent_errors_are_told_by_kind_and_counted():
    errors = [("cat", "bat"), ("on", None), ("cat", "bat"), (None, "uh"), ("cat", "hat"), (None, "uh")]
    assert frequent_errors(errors) == {
        "substitutions": [["cat", "bat", 2], ["cat", "hat", 1]],
        "deletions": [["on", 1]],
        "insertions": [["uh", 2]],
    }
    assert frequent_errors(errors, most=1)["substitutions"] == [["cat", "bat", 2]]


def test_paired_bootstrap_sees_a_difference_that_is_lost_in_two_intervals():
    rng = np.random.default_rng(0)
    words = rng.integers(3, 15, size=300)
    hard = rng.beta(0.5, 0.5, size=300)
    worse = np.stack([rng.binomial(words, hard), words], axis=1)
    better = np.stack([rng.binomial(worse[:, 0], 0.93), words], axis=1)
    result = paired_bootstrap(better, worse)
    assert bootstrap_interval(better)[1] > bootstrap_interval(worse)[0]
    assert result["low"] < result["difference"] < result["high"] < 0
    assert result["difference"] == pytest.approx((better[:, 0].sum() - worse[:, 0].sum()) / words.sum())
    assert result["share_better"] == 1
    swapped = paired_bootstrap(worse, better)
    assert swapped["low"] == pytest.approx(-result["high"])
    assert swapped["share_better"] == 0


def test_paired_bootstrap_of_a_model_with_itself_finds_nothing():
    counts = np.array([[1, 4], [0, 3], [2, 2]])
    assert paired_bootstrap(counts, counts) == {"difference": 0, "low": 0, "high": 0, "share_better": 0.5}
    with pytest.raises(ValueError, match="same references"):
        paired_bootstrap(counts, np.array([[1, 4], [0, 3], [2, 3]]))


def test_bootstrap_does_not_depend_on_how_many_numbers_are_drawn_at_once(monkeypatch):
    counts = np.array([[1, 4], [0, 3], [2, 2], [5, 9]])
    whole = bootstrap_interval(counts)
    monkeypatch.setattr("hf_speechcl.evaluation.asr.MAX_DRAWS", 50)
    assert bootstrap_interval(counts) == whole


def test_slices_hold_every_clip_once_and_small_ones_have_no_interval():
    counts = np.array([[1, 2]] * 6 + [[0, 10]] + [[3, 1]])
    slices = slice_rates(counts, ["ann"] * 6 + ["bob", None])
    assert [(entry["name"], entry["clips"], entry["words"]) for entry in slices] == [
        ("ann", 6, 12), ("bob", 1, 10), (None, 1, 1),
    ]  # fmt: skip
    assert [entry["wer"] for entry in slices] == [0.5, 0, 3]
    assert [entry["wer_low"] for entry in slices] == [0.5, None, None]


def test_bins_have_their_lower_edge():
    names = name_bins([0, 0.99, 1, 1.5, 2, 100, None], [1, 2], "s")
    assert names == ["under 1 s"] * 2 + ["1 to 2 s"] * 2 + ["2 s and more"] * 2 + [None]


def test_histogram_has_every_clip_in_one_bar_and_perfect_ones_apart():
    bars = {bar["label"]: bar["clips"] for bar in histogram([0, 0, 0.05, 0.1, 3 * 0.1, 1, 1.0001, 7])}
    assert {label: clips for label, clips in bars.items() if clips} == {
        "0%": 2, "0–10%": 2, "20–30%": 1, "90–100%": 1, "> 100%": 2,
    }  # fmt: skip


def test_whisper_english_normalization_makes_spellings_and_numbers_alike():
    texts = ["Um, Mr. Smith's colour [noise] isn't twenty-one dollars!", "mister smith is color is not $21"]
    assert len({normalize_text(text, "whisper_english") for text in texts}) == 1


def test_missing_package_of_a_normalization_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    normalize_text.__globals__["_whisper_english"].cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"whisper-normalizer.* pip install hf_speechcl\[eval\]"):
        normalize_text("a", "whisper_english")


# Signal-to-noise ratio


@pytest.mark.parametrize("snr", [5, 15, 30])
def test_estimated_snr_is_that_of_noise_added_to_sound_with_pauses(snr):
    rng = np.random.default_rng(0)
    sound = rng.standard_normal(32000) * np.repeat([0, 1, 1, 0, 1], 6400)
    noise = rng.standard_normal(32000) * 10 ** (-snr / 20)
    assert estimate_snr((0.1 * (sound + noise)).astype(np.float32), 16000) == pytest.approx(snr, abs=2)


def test_estimated_snr_falls_with_noise_and_is_finite_for_odd_clips(clips):
    rng = np.random.default_rng(0)
    for clip in clips:
        noise = rng.standard_normal(len(clip)).astype(np.float32) * clip.std()
        values = [estimate_snr(clip + level * noise, 16000) for level in (0, 0.1, 0.3, 1)]
        assert values == sorted(values, reverse=True)
    for odd in (np.zeros(16000), np.ones(3), np.full(16000, 0.5), np.sin(np.arange(16000))):
        assert np.isfinite(estimate_snr(odd.astype(np.float32), 16000))


# Corpora with further columns


def test_further_columns_are_kept_as_texts_where_a_source_has_them(labelled_folder, tmp_path):
    audio = [{"bytes": None, "path": str(labelled_folder / f"clip{number}.wav")} for number in range(2)]
    rows = Dataset.from_dict({"audio": audio, "language": [1, None], "year": [1995, 2003]})
    rows.cast_column("language", ClassLabel(names=["en", "fr"])).to_parquet(tmp_path / "train.parquet")
    columns = ["speaker", "language", "year"]
    corpus = load_corpus([str(labelled_folder), str(tmp_path / "train.parquet"), "demo"], keep_columns=columns)
    assert corpus["speaker"][:6] == [who for _, who in TEXTS] + [None] * 2
    assert corpus["language"][:6] == [None] * 4 + ["fr", None]
    assert corpus["year"][:6] == [None] * 4 + ["1995", "2003"]
    with pytest.raises(ValueError, match="keep_columns: text would hide"):
        load_corpus("demo", keep_columns=["text"])


def test_class_names_are_those_of_each_shard(labelled_folder, tmp_path):
    audio = [{"bytes": None, "path": str(labelled_folder / f"clip{number}.wav")} for number in range(2)]
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, names in enumerate((["ann", "bob"], ["bob", "ann"])):
        rows = Dataset.from_dict({"audio": audio, "speaker": [0, 1]})
        rows.cast_column("speaker", ClassLabel(names=names)).to_parquet(folder / f"train-{shard}.parquet")
    assert load_corpus(str(folder), keep_columns=["speaker"])["speaker"][:] == ["ann", "bob", "bob", "ann"]


def test_ids_of_two_sources_are_told_apart(audio_folder):
    names = load_corpus([str(audio_folder), str(audio_folder)])["id"][:]
    assert len(set(names)) == 8


# Runs that are cut off


def as_heard(corpus):
    return SpeechDataset(corpus, CountingRecognizer.sampling_rate, min_seconds=0, in_16_bits=False)


def test_interrupted_run_goes_on_with_what_is_left_and_gives_the_same(corpus, tmp_path):
    dataset = as_heard(corpus)
    whole = transcribe(CountingRecognizer(), dataset, 10)
    output, identity = tmp_path / "test.json", {"model": "a"}
    broken = CountingRecognizer(clips_before_breakdown=20)
    with pytest.raises(KeyboardInterrupt):
        transcribe(broken, dataset, 10, TranscriptLog(output, identity))
    partial = tmp_path / "test.json.partial-0.jsonl"
    with partial.open("ab") as stream:  # a line that was being written
        stream.write(b'{"id": "demo/1", "te')
    recognizer = CountingRecognizer()
    log = TranscriptLog(output, identity)
    assert len(log.records) == broken.heard
    resumed = transcribe(recognizer, dataset, 10, log)
    assert recognizer.heard == len(corpus) - broken.heard
    assert [record["text"] for record in resumed] == [record["text"] for record in whole]
    assert len(partial.read_text().splitlines()) == 1 + len(corpus)
    log.remove()
    assert not list(tmp_path.glob("test.json*"))


def test_transcripts_of_another_model_are_refused_or_forgotten(corpus, tmp_path):
    output = tmp_path / "test.json"
    log = TranscriptLog(output, {"model": "a", "corpus": 1})
    transcribe(CountingRecognizer(), as_heard(corpus.select(range(3))), 10, log)
    with pytest.raises(ValueError, match=r"interrupted run with another model: .* --restart True"):
        TranscriptLog(output, {"model": "b", "corpus": 1})
    assert TranscriptLog(output, {"model": "b", "corpus": 1}, restart=True).records == {}


def test_clips_that_cannot_be_decoded_have_no_text_and_long_ones_are_recordings(audio_folder):
    soundfile.write(audio_folder / "silent.wav", np.zeros(16000), 16000)
    corpus = load_corpus(str(audio_folder))
    seconds = sorted(corpus["duration"])
    records = {
        record["id"]: record for record in transcribe(CountingRecognizer(), as_heard(corpus), seconds[-1] - 0.01)
    }
    assert (records["silent.wav"]["text"], records["silent.wav"]["snr"]) == (None, None)
    assert sorted(record["text"] == "a recording" for record in records.values()) == [False] * 4 + [True]


# The script


def test_script_scores_a_model_of_another_kind_by_slices_and_its_report_is_safe(
    labelled_folder, model_folder, tmp_path, capsys
):
    soundfile.write(labelled_folder / "silent.wav", np.zeros(16000), 16000)
    with (labelled_folder / "metadata.csv").open("a") as stream:
        stream.write("\nsilent.wav,nothing,ann\nmissing.wav,nothing,ann")
    output, report = tmp_path / "out" / "test.json", tmp_path / "out" / "test.html"
    run(model_folder, labelled_folder, "--text_normalization", "none", "--output_file", output, "--report_file", report)
    results = json.loads(output.read_text())
    assert results.keys() >= {
        "model", "corpus", "split", "clips", "hours", "text_normalization", "decoding", "device", "wer",
        "wer_low", "wer_high", "dtype", "cer", "cer_low", "cer_high", "real_time_factor", "comparison",
    }  # fmt: skip
    assert (results["model"], results["corpus"], results["clips"]) == ("random", ["audio"], 4)
    assert results["clips_skipped"] == ["missing.wav", "silent.wav"]
    assert list(results["slices"]) == ["speaker", "duration", "signal-to-noise ratio"]
    for entries in results["slices"].values():
        assert sum(entry["clips"] for entry in entries) == 4
        assert sum(entry["words"] * entry["wer"] for entry in entries) == pytest.approx(
            sum(len(clip["errors"]) for clip in results["transcripts"])
        )
    printed = capsys.readouterr().out
    assert re.search(r"WER \d+\.\d% +\(95% interval", printed)
    assert "normalisation none; decoding greedy" in printed
    assert "2 clips cannot be decoded" in printed
    assert "intervals of fewer than 5 clips are much too narrow" in printed
    page = report.read_text()
    assert page.count("<section") == page.count("data:audio/ogg;base64,") == 4
    parsed = PageParser()
    parsed.feed(page)
    assert not parsed.tags & {"script", "img", "link", "iframe", "a"}
    assert all(value.startswith("data:audio/ogg;base64,") for value in parsed.attributes["src"])
    assert not [name for name in parsed.attributes if name.startswith("on") or name == "href"]
    assert not re.search(r"url\(|@import", page)
    for text in ("<script>alert(1)</script>", "{{7*7}}", "<b>bob</b>", "silent.wav"):
        assert text in parsed.text
    for text in (page, output.read_text()):
        assert str(tmp_path) not in text
        assert str(model_folder.parent) not in text
    assert sorted(file.name for file in output.parent.iterdir()) == ["test.html", "test.json"]


def test_models_are_compared_on_the_same_clips_only(labelled_folder, model_folder, tmp_path, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    run(model_folder, labelled_folder, "--output_file", first)
    run(
        model_folder, labelled_folder, "--output_file", second, "--compare_with", first, "--report_file", tmp_path / "r"
    )
    comparison = json.loads(second.read_text())["comparison"]
    assert (comparison["model"], comparison["clips"]) == ("random", 4)
    assert comparison["wer"] == {
        "other": json.loads(first.read_text())["wer"], "difference": 0, "low": 0, "high": 0, "share_better": 0.5,
    }  # fmt: skip
    assert "WER minus that of random" in capsys.readouterr().out
    assert "Compared with random" in (tmp_path / "r").read_text()
    with pytest.raises(SystemExit):
        run(model_folder, labelled_folder, "--output_file", first, "--compare_with", first)
    assert "is what compare_with reads: give another name" in capsys.readouterr().err
    mine = tmp_path / "results.json"
    mine.write_text('{"eval_wer": 0.1}')
    with pytest.raises(SystemExit):
        run(model_folder, labelled_folder, "--output_file", mine)
    assert "results.json is not of an evaluation, and is left as it is" in capsys.readouterr().err
    assert mine.read_text() == '{"eval_wer": 0.1}'
    with pytest.raises(ValueError, match="scored with text_normalization basic, this run is with none"):
        run(model_folder, labelled_folder, "--text_normalization", "none", "--compare_with", first)
    second.write_text('{"wer": 0.1, "transcripts": []}')
    with pytest.raises(ValueError, match="lacks clips_skipped, decoding, model, te"):
        run(model_folder, labelled_folder, "--compare_with", second)
    (labelled_folder / "metadata.csv").write_text("file_name,text\nclip0.wav,hello there\nclip1.wav,other")
    with pytest.raises(ValueError, match="is of 4 clips, this run of 2, and 3 are not in both .*clip1.wav"):
        run(model_folder, labelled_folder, "--compare_with", first)


def test_a_comparison_is_of_this_model_less_the_other_on_the_clips_of_both():
    clips = [{"id": name, "reference": "a b", "hypothesis": "a c"} for name in "wxyz"]
    others = [{"id": name, "reference": "a b", "hypothesis": "a b"} for name in "xyz"]
    other = {"model": "other", "decoding": "greedy", "transcripts": others}
    found = compare(clips, other)
    assert found["clips"] == 3
    assert found["wer"] == {"other": 0, "difference": 0.5, "low": 0.5, "high": 0.5, "share_better": 0}
    assert found["cer"]["difference"] == pytest.approx(1 / 3)


def test_script_goes_on_after_an_interruption_and_not_with_other_weights(
    labelled_folder, model_folder, tmp_path, monkeypatch
):
    output = tmp_path / "test.json"
    arguments = (model_folder, labelled_folder, "--output_file", output, "--max_seconds_per_batch", 0.05)
    run(*arguments)
    whole = json.loads(output.read_text())["transcripts"]
    output.unlink()
    calls = []
    method = SpeechRecognizer.transcribe_recording

    def breaking(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return method(self, *arguments)

    monkeypatch.setattr(SpeechRecognizer, "transcribe_recording", breaking)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    with pytest.raises(ValueError, match="another corpus"):
        run(*arguments, "--corpus", "demo", "--split", "validation")
    with pytest.raises(ValueError, match="another dtype"):
        run(*arguments, "--dtype", "bfloat16")
    run(*arguments)
    assert [clip["hypothesis"] for clip in json.loads(output.read_text())["transcripts"]] == [
        clip["hypothesis"] for clip in whole
    ]
    assert len(calls) <= 5


def test_a_run_that_could_not_begin_is_no_interrupted_one(labelled_folder, model_folder, trained, tmp_path):
    output = tmp_path / "test.json"
    with pytest.raises(ValueError, match="writes no text: fine-tune it first"):
        run(trained / "encoder", labelled_folder, "--output_file", output)
    assert not list(tmp_path.glob("test.json*"))
    run(model_folder, labelled_folder, "--output_file", output)


def test_scores_go_into_the_card_of_the_model_when_asked_for(labelled_folder, model_folder, tmp_path, monkeypatch):
    added = {}
    monkeypatch.setattr("hf_speechcl.hub.add_results", lambda *arguments: added.update([arguments]), raising=False)
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "README.md").write_text("---\n---\n")
    with pytest.raises(ValueError, match="a card holds scores of dtype float32, not of int8"):
        run(folder, labelled_folder, "--add_to_card", "True", "--dtype", "int8")
    assert not added
    run(folder, labelled_folder, "--add_to_card", "True")
    assert added[folder]["corpus"] == ["audio"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text_normalization", "upper"], "unknown text normalisation 'upper': expected none, basic, whisper_eng"),
        (["--max_seconds_per_batch", "0"], "max_seconds_per_batch must be positive"),
        (["--device", "tpu9"], "device: 'tpu9' cannot be used"),
        (["--dtype", "int4"], "dtype must be one of float32, bfloat16, int8, found 'int4'"),
        (["--add_to_card", "True", "--model", "user/name"], "add_to_card: there is no README.md in a folder 'user/na"),
        (["--output_file", "."], "output_file: . is a folder, expected the name of a file"),
        (["--output_file", "a.json", "--report_file", "./a.json"], "report_file: ./a.json is the output_file too"),
        (["--restart", "True"], "restart: without output_file nothing is left"),
        (["--compare_with", "/no/such.json"], "compare_with: /no/such.json cannot be read"),
        (["--model", "/no/such"], "no folder /no/such here, and no Hub name"),
        (["--slice_columns", "room"], "slice_columns: demo has nothing in room"),
        (["--slice_columns", "text"], "slice_columns: text is no column to score clips by"),
    ],
)
def test_wrong_option_is_named(arguments, message, model_folder, capsys):
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        evaluate(["--model", str(model_folder), "--device", "cpu", *arguments])
    assert getattr(error.value, "code", 2) in (2, None)
    assert message in f"{error.value}\n{capsys.readouterr().err}"
