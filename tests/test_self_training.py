"""Texts that a recogniser writes, and learning from them."""

import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from transformers import AutoModelForCTC

from hf_speechcl import load_corpus
from hf_speechcl.data.audio import read_audio, to_int16
from hf_speechcl.recognizer import SpeechRecognizer
from hf_speechcl.training import finetune_ctc, make_pseudo_labels
from tests.conftest import FAST_RUN

RATE = 16000


@pytest.fixture(scope="module")
def teacher(trained, tmp_path_factory):
    """A recogniser that always writes something."""
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    shutil.copytree(trained / "ctc", folder)
    model = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.bias[model.config.pad_token_id] -= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def audio(clips, tmp_path):
    """A folder of five recordings, one of which is no audio."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for number, clip in enumerate(clips[:4]):
        soundfile.write(folder / f"{number}.wav", clip, RATE)
    soundfile.write(folder / "4.flac", clips[4], RATE)
    (folder / "4.flac").write_bytes((folder / "4.flac").read_bytes()[:3000])
    return folder


def make(teacher, audio, folder, *options):
    argv = ["--model", str(teacher), "--corpus", str(audio), "--output_dir", str(folder), "--device", "cpu", *options]
    make_pseudo_labels.main(argv)
    return pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()


def test_texts_are_those_of_the_recogniser_clip_by_clip(teacher, audio, clips, tmp_path, capsys):
    rows = make(teacher, audio, tmp_path / "pseudo")
    assert [row["id"] for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    recognizer = SpeechRecognizer.from_pretrained(teacher)
    for row in rows:
        samples = read_audio({"bytes": None, "path": str(audio / row["id"])}, RATE)
        kept = read_audio(row["audio"], RATE)
        np.testing.assert_array_equal(to_int16(kept), to_int16(samples))
        assert row["duration"] == pytest.approx(len(samples) / RATE)
        assert row["text"] == recognizer.transcribe([kept])[0].text != ""
    assert "5 clips (0.00 h): 1 could not be decoded, 0 have an empty text" in capsys.readouterr().out


def test_long_recordings_are_split(teacher, audio, tmp_path):
    rows = make(teacher, audio, tmp_path / "pseudo", "--max_seconds", "1")
    parts = [row for row in rows if row["id"].startswith("3.wav")]
    whole = soundfile.info(audio / "3.wav").duration
    assert len(parts) == np.ceil(whole)
    assert parts[1]["id"] == f"3.wav@{round(whole / len(parts), 3):g}"
    assert sum(part["duration"] for part in parts) == pytest.approx(whole, abs=0.01)


def test_a_killed_run_goes_on_and_other_options_are_refused(teacher, audio, tmp_path, monkeypatch):
    options = ("--max_seconds", "4", "--max_seconds_per_batch", "4")  # two batches of what can be read
    rows = make(teacher, audio, tmp_path / "whole", *options)
    folder, heard, transcribe = tmp_path / "pseudo", [], SpeechRecognizer.transcribe

    def one_batch(self, waveforms):
        if heard:
            raise KeyboardInterrupt
        heard.append(len(waveforms))
        return transcribe(self, waveforms)

    def count(self, waveforms):
        heard.append(len(waveforms))
        return transcribe(self, waveforms)

    monkeypatch.setattr(SpeechRecognizer, "transcribe", one_batch)
    with pytest.raises(KeyboardInterrupt):
        make(teacher, audio, folder, *options)
    monkeypatch.setattr(SpeechRecognizer, "transcribe", count)
    with pytest.raises(ValueError, match="interrupted run with another max_seconds"):
        make(teacher, audio, folder, "--max_seconds", "5")
    assert make(teacher, audio, folder, *options) == rows
    assert sum(heard) == len(rows) == 4
    assert {path.name for path in folder.iterdir()} == {"train.parquet", "pseudo_labels.json"}
    assert make(teacher, audio, folder, *options) == rows
    assert sum(heard) == 4
    with pytest.raises(FileExistsError, match="max_seconds=4.0, now 5.0: delete it or give another --output_dir"):
        make(teacher, audio, folder, "--max_seconds", "5")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        make(teacher, audio, tmp_path / "other")


def test_options_that_are_missing_are_asked_for(capsys):
    with pytest.raises(SystemExit):
        make_pseudo_labels.main(["--corpus", "demo"])
    assert "expected --model" in capsys.readouterr().err


def test_pseudo_labels_are_learnt_from_but_not_validated_on(trained, clips, tmp_path):
    corpus = load_corpus("demo", "train")
    writes = [("Further clip", clips[0]), ("Ünknown", clips[1])]
    streams = []
    for number, (_, clip) in enumerate(writes):
        soundfile.write(tmp_path / f"{number}.wav", clip, RATE)
        streams.append({"bytes": (tmp_path / f"{number}.wav").read_bytes(), "path": None})
    pseudo = tmp_path / "pseudo"
    pseudo.mkdir()
    table = {"id": ["a", "b"], "audio": streams, "text": [text for text, _ in writes]}
    pyarrow.parquet.write_table(pyarrow.table(table), pseudo / "train-00000.parquet")
    options = ["--model", str(trained / "encoder"), "--max_steps", "1", *FAST_RUN]
    finetune_ctc.main([*options, "--pseudo_labels", str(pseudo), "--output_dir", str(tmp_path / "student")])
    report = json.loads((tmp_path / "student/preflight_train.json").read_text())
    assert report["num_clips"] == len(corpus) + 2
    left_out = {problem["id"]: problem["detail"] for problem in report["problems"]}
    assert left_out["b"] == "ü"  # the true transcripts have no such letter
    assert "a" not in left_out
    vocabulary = (tmp_path / "student/vocab.json").read_text()
    assert vocabulary == (trained / "ctc/vocab.json").read_text()
    validation = json.loads((tmp_path / "student/preflight_validation.json").read_text())
    assert validation["num_clips"] == len(load_corpus("demo", "validation"))
    card = (tmp_path / "student/README.md").read_text()
    assert "The texts of `pseudo" in card
    assert "written by a recogniser" in card
