"""Texts that a recogniser writes, and learning from them."""

import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch
from transformers import AutoModelForCTC

from hf_speechcl import load_corpus
from hf_speechcl.data import pseudo_labels
from hf_speechcl.data.audio import read_audio, to_int16
from hf_speechcl.data.pseudo_labels import SCHEMA, KnownRecordings, PseudoLabels, recording_key
from hf_speechcl.recognizer import SpeechRecognizer
from hf_speechcl.text_policy import TextPolicy
from hf_speechcl.training import finetune_ctc, make_pseudo_labels
from tests.conftest import FAST_RUN, ROOT, launch, needs_lm

RATE = 16000


def with_blank_bias(recogniser, folder, bias):
    shutil.copytree(recogniser, folder)
    model = AutoModelForCTC.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.bias[model.config.pad_token_id] += bias
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(trained, tmp_path_factory):
    """A recogniser that always writes something."""
    return with_blank_bias(trained / "ctc", tmp_path_factory.mktemp("teachers") / "teacher", -10)


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
    return rows_of(folder)


def rows_of(folder):
    return pyarrow.parquet.read_table(sorted(folder.glob("*.parquet"))).to_pylist()


# ---- making them ----


def test_texts_are_those_of_the_recogniser_clip_by_clip(teacher, audio, tmp_path, capsys):
    rows = make(teacher, audio, tmp_path / "pseudo")
    assert [row["id"] for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    recognizer = SpeechRecognizer.from_pretrained(teacher)
    for row in rows:
        samples = read_audio({"bytes": None, "path": str(audio / row["id"])}, RATE)
        kept = read_audio(row["audio"], RATE)
        np.testing.assert_array_equal(to_int16(kept), to_int16(samples))
        assert row["duration"] == pytest.approx(len(samples) / RATE)
        assert row["recording"] == recording_key(row["id"], len(samples) / RATE)
        assert row["text"] == recognizer.transcribe([kept])[0].text != ""
    assert "4 of 5 clips (0.00 h) are written, 1 could not be decoded, 0 have" in capsys.readouterr().out
    labels = PseudoLabels.load(tmp_path / "pseudo")
    assert labels.description["text_policy"] == TextPolicy().to_dict()
    assert (labels.description["sampling_rate"], labels.description["clips"]) == (RATE, 4)
    assert labels.description["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3600)


def test_source_is_as_asked_for(teacher, audio, tmp_path):
    (audio / "test").mkdir()
    (audio / "0.wav").rename(audio / "test/0.wav")
    greedy = make(teacher, audio, tmp_path / "greedy", "--split", "test")
    assert [row["id"] for row in greedy] == ["test/0.wav"]
    assert make(teacher, audio, tmp_path / "long", "--min_seconds", "2")[0]["duration"] > 2
    pyarrow.parquet.write_table(pyarrow.table({"sound": [greedy[0]["audio"]]}), tmp_path / "train.parquet")
    again = make(teacher, tmp_path / "train.parquet", tmp_path / "again", "--audio_column", "sound")
    assert again[0]["text"] == greedy[0]["text"]


@needs_lm
def test_decoding_is_as_asked_for(teacher, audio, tmp_path):
    hot = ("--beam_width", "5", "--hot_words", "zz", "--hot_word_weight", "50")
    greedy = make(teacher, audio, tmp_path / "greedy")
    assert make(teacher, audio, tmp_path / "hot", *hot)[0]["text"] != greedy[0]["text"]
    with pytest.raises(FileExistsError, match="decoding="):
        make(teacher, audio, tmp_path / "greedy", "--beam_width", "2")


def test_long_recordings_are_split(teacher, audio, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "ROWS_PER_GROUP", 2)
    rows = make(teacher, audio, tmp_path / "pseudo", "--max_seconds", "1", "--max_seconds_per_batch", "0.5")
    parts = [row for row in rows if row["id"].startswith("3.wav")]
    whole = soundfile.info(audio / "3.wav").duration
    assert len(parts) == np.ceil(whole)
    assert parts[1]["id"] == f"3.wav@{whole / len(parts):.3f}"
    assert sum(part["duration"] for part in parts) == pytest.approx(whole, abs=0.01)
    assert len({part["text"] for part in parts}) == len(parts)
    assert len({row["id"] for row in rows}) == len(rows) == 1 + 1 + 2 + 3


def test_clips_that_cannot_be_kept_are_counted(teacher, audio, tmp_path, capsys):
    soundfile.write(audio / "loud.wav", 2000 * np.ones(RATE, np.float32), RATE, subtype="FLOAT")
    rows = make(teacher, audio, tmp_path / "pseudo")
    assert [row["id"] for row in rows] == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert "4 of 6 clips (0.00 h) are written, 2 could not be decoded" in capsys.readouterr().out


def test_licences_of_the_audio_stay_with_it(teacher, tmp_path):
    make(teacher, "demo", tmp_path / "pseudo", "--split", "validation")
    assert "CC-BY-SA-3.0" in (tmp_path / "pseudo/LICENSE.md").read_text()


def test_a_recogniser_that_writes_nothing_is_no_teacher(trained, audio, tmp_path):
    silent = with_blank_bias(trained / "ctc", tmp_path / "silent", 100)
    with pytest.raises(ValueError, match="silent.* wrote nothing of any of 5 clips"):
        make(silent, audio, tmp_path / "pseudo")


def test_a_killed_run_goes_on(teacher, audio, tmp_path, monkeypatch):
    options = ("--max_seconds", "4", "--max_seconds_per_batch", "4")  # two batches of what can be read
    rows = make(teacher, audio, tmp_path / "whole", *options)
    folder, heard, transcribe = tmp_path / "pseudo", [], SpeechRecognizer.transcribe

    def one_batch(self, waveforms):
        if heard:
            raise KeyboardInterrupt
        heard.append(len(waveforms))
        return transcribe(self, waveforms)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def count(self, waveforms):
        heard.append(len(waveforms))
        return transcribe(self, waveforms)

    monkeypatch.setattr(SpeechRecognizer, "transcribe", one_batch)
    with pytest.raises(KeyboardInterrupt):
        make(teacher, audio, folder, *options)
    with pytest.raises(ValueError, match="is not finished: run scripts/make_pseudo_labels.py"):
        PseudoLabels.load(folder)
    monkeypatch.setattr(SpeechRecognizer, "transcribe", count)
    with monkeypatch.context() as patched:
        patched.setattr(soundfile, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(teacher, audio, folder, *options)
    (folder / "train-00001-of-00002.begun").write_bytes(b"of a launch of two that was killed")
    assert make(teacher, audio, folder, *options) == rows
    assert sum(heard) == len(rows) == 4
    names = {"train-00000-of-00001.parquet", "pseudo_labels.json", "LICENSE.md"}
    assert {path.name for path in folder.iterdir()} == names
    identity = json.loads((folder / "pseudo_labels.json").read_text())["identity"]
    another = {**identity, "weights": "of another model"}
    (folder / "texts.partial-1.jsonl").write_text(json.dumps(another) + "\n")
    assert make(teacher, audio, folder, *options) == rows
    assert sum(heard) == 4
    assert {path.name for path in folder.iterdir()} == names


def test_what_else_is_in_the_folder_is_not_touched(teacher, trained, audio, tmp_path):
    folder = tmp_path / "pseudo"
    make(teacher, audio, folder)
    with pytest.raises(FileExistsError, match="max_seconds=15.0, now 5.0: delete it or give another --output_dir"):
        make(teacher, audio, folder, "--max_seconds", "5")
    with pytest.raises(FileExistsError, match="weights="):
        make(trained / "ctc", audio, folder)
    with pytest.raises(FileExistsError, match="clips="):
        make(teacher, audio, folder, "--audio_column", "audio_far")
    with pytest.raises(FileExistsError, match="dtype='float32', now 'int8'"):
        make(teacher, audio, folder, "--dtype", "int8")
    rows = make(shutil.copytree(teacher, tmp_path / "moved"), audio, folder)
    (folder / "train-00000-of-00001.parquet").unlink()
    assert make(teacher, audio, folder) == rows
    (audio / "2.wav").unlink()
    with pytest.raises(FileExistsError, match="clips="):
        make(teacher, audio, folder)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.parquet").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds other files"):
        make(teacher, audio, mine)
    assert (mine / "train.parquet").read_bytes() == b"mine"


def test_two_processes_write_what_one_writes(teacher, audio, tmp_path):
    rows = make(teacher, audio, tmp_path / "one")
    options = ["--model", teacher, "--corpus", audio, "--output_dir", tmp_path / "two", "--device", "cpu"]
    launch(ROOT / "scripts/make_pseudo_labels.py", *options)
    assert sorted(rows_of(tmp_path / "two"), key=lambda row: row["id"]) == rows
    assert len(list((tmp_path / "two").glob("*.parquet"))) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "demo"], "expected --model"),
        (["--model", "x"], "expected --corpus"),
        (
            ["--model", "x", "--corpus", "demo", "--max_seconds_per_batch", "0"],
            "max_seconds_per_batch must be positive",
        ),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit):
        make_pseudo_labels.main(options)
    assert message in capsys.readouterr().err


# ---- learning from them ----


def write_labels(folder, clips, texts, recordings, **description):
    """A folder as the script writes it."""
    folder.mkdir()
    rows = []
    for number, (clip, text, recording) in enumerate(zip(clips, texts, recordings)):
        soundfile.write(folder / "clip.flac", clip, RATE)
        audio = {"bytes": (folder / "clip.flac").read_bytes(), "path": None}
        seconds = len(clip) / RATE
        rows.append({"id": str(number), "audio": audio, "text": text, "duration": seconds, "recording": recording})
    (folder / "clip.flac").unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), folder / "train-0.parquet")
    known = {
        "recognizer": "ear",
        "corpus": ["my_audio"],
        "text_policy": None,
        "sampling_rate": RATE,
        "clips": len(rows),
    }
    PseudoLabels(folder, known | description).save_description()
    return folder


def test_recordings_are_known_again_from_other_folders_and_not_by_their_last_name_alone():
    known = KnownRecordings(["spk1/001.wav 3.00", "b.wav 1.00", "train/spk2/c.wav 2.00"])
    for key in ("spk1/001.wav 3.00", "corpus/spk1/001.wav 3.00", "001.wav 3.00", "x/b.wav 1.00", "dev/spk2/c.wav 2.00"):
        assert key in known, key
    assert all(f"001.wav {seconds}" in known for seconds in ("3.01", "2.99", "3.05"))  # of sources that round
    assert "d.wav 2.51" not in KnownRecordings(["d.wav 2.53"])  # neither is rounded
    for key in ("spk2/001.wav 3.00", "spk1/001.wav 3.06", "a/spk2/001.wav 3.00", "c2.wav 2.00"):
        assert key not in known, key


def learn(trained, pseudo, folder, *options):
    argv = ["--model", str(trained / "encoder"), "--max_steps", "1", *FAST_RUN, "--pseudo_labels", str(pseudo)]
    finetune_ctc.main([*argv, "--output_dir", str(folder), *options])


def test_pseudo_labels_are_learnt_from_beside_the_corpus(trained, clips, tmp_path, caplog):
    train, validation = (load_corpus("demo", split) for split in ("train", "validation"))
    known = [recording_key(corpus[0]["id"], corpus[0]["duration"]) for corpus in (train, validation)]
    known = [known[0].replace("/", "/validation/"), f"elsewhere/{known[1]}"]
    texts, recordings = ["Further clip", "Ünknown", "a", "b"], ["a 1.00", f"{train[0]['id']} 0.11", *known]
    pseudo = write_labels(tmp_path / "pseudo", clips[1:], texts, recordings, sampling_rate=8000)
    learn(trained, pseudo, tmp_path / "student")
    assert "2 of 4 clips are of recordings whose text is known or held out" in caplog.text
    assert "holds audio of 8000 Hz, and the model hears 16000 Hz" in caplog.text
    report = json.loads((tmp_path / "student/preflight_train.json").read_text())
    assert report["num_clips"] == len(train) + 2
    left_out = {problem["id"]: problem["detail"] for problem in report["problems"]}
    (name,) = (id for id in left_out if id.endswith("/1"))
    assert left_out[name] == "ü"  # the true transcripts have no such letter
    assert (tmp_path / "student/vocab.json").read_text() == (trained / "ctc/vocab.json").read_text()
    assert json.loads((tmp_path / "student/preflight_validation.json").read_text())["num_clips"] == len(validation)
    card = (tmp_path / "student/README.md").read_text()
    assert "(audio of my_audio) were written by the recogniser `ear`" in card
    assert "kahn2020self" in card
    (row,) = (line for line in card.splitlines() if "train, pseudo-labels" in line)
    assert row.split("|")[3].strip() == "1"
    true = next(line for line in card.splitlines() if line.startswith("| demo | train |"))
    assert true.split("|")[3].strip() == str(len(train) - len(left_out) + 1)


def test_recordings_are_known_where_sources_have_the_same_ids(teacher, audio, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(other / "0.wav", np.zeros(RATE, np.float32) + 0.1, RATE)
    both = make(teacher, audio, tmp_path / "pseudo", "--corpus", str(audio), str(other))
    assert sorted(row["id"] for row in both)[:2] == ["0.wav#0", "0.wav#5"]
    new = pseudo_labels.load_pseudo_labels([PseudoLabels.load(tmp_path / "pseudo")], load_corpus(str(audio)))
    assert new["id"] == ["pseudo/0.wav#5"]


def test_recordings_of_the_corpus_without_a_transcript_are_learnt(trained, clips, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, clip in enumerate(clips):
        soundfile.write(folder / f"{number}.wav", clip, 16000)
    (folder / "metadata.csv").write_text("file_name,text\n0.wav,on\n1.wav,no\n")
    rows = load_corpus(str(folder))
    keys = [recording_key(id, seconds) for id, seconds in zip(rows["id"], rows["duration"])]
    options = ["--corpus", str(folder)]
    pseudo = write_labels(tmp_path / "pseudo", clips[1:3], ["no", "on"], keys[1:3])
    learn(trained, pseudo, tmp_path / "student", *options)
    report = json.loads((tmp_path / "student/preflight_train.json").read_text())
    assert report["num_clips"] == len(clips) - 1 + 1  # all but one held out, and the one that had no text
    all_known = write_labels(tmp_path / "known", clips[:2], ["on", "no"], keys[:2])
    with pytest.raises(ValueError, match="pseudo_labels: all clips are of recordings of the corpus that have a tran"):
        learn(trained, all_known, tmp_path / "other", *options)


@pytest.mark.parametrize(
    ("description", "text", "error", "message"),
    [
        (
            {"text_policy": {**TextPolicy().to_dict(), "casing": "upper"}},
            "A",
            ValueError,
            r"casing upper \(now lower\)",
        ),
        ({}, "ü", ValueError, "no clip of pseudo_labels can be trained on"),
    ],
)
def test_pseudo_labels_that_do_not_fit_are_refused(trained, clips, tmp_path, description, text, error, message):
    pseudo = write_labels(tmp_path / "pseudo", clips[:1], [text], ["a 1.00"], **description)
    with pytest.raises(error, match=message):
        learn(trained, pseudo, tmp_path / "student")


def test_another_folder_than_one_of_pseudo_labels_is_refused(trained, audio, tmp_path):
    with pytest.raises(FileNotFoundError, match="no pseudo_labels.json in .*audio"):
        learn(trained, audio, tmp_path / "student")
