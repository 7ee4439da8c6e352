"""Corpora and data sets, on real clips and on bad ones."""

import json
import os

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from hf_speechcl import load_corpus, load_demo
from hf_speechcl.data import SpeechDataset
from hf_speechcl.data.audio import read_audio, to_float32
from hf_speechcl.data.corpora import corpus_splits, load_train_and_validation
from hf_speechcl.data.folders import split_of
from tests.conftest import wav_bytes
from tests.test_audio import BAD_BYTES

# ---- the embedded corpus ----


def test_embedded_corpus_has_its_splits_and_no_text_in_two_of_them():
    splits = load_demo()
    assert {name: len(split) for name, split in splits.items()} == {"train": 406, "validation": 60, "test": 83}
    texts = {name: {text.lower() for text in split["text"]} for name, split in splits.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["test"]


def test_embedded_corpus_decodes_to_its_durations():
    corpus = load_corpus("demo", "test")
    for row in corpus.select(range(10)):
        assert len(read_audio(row["audio"], 16000)) / 16000 == pytest.approx(row["duration"], abs=0.001)


# ---- corpora ----


def test_folder_of_audio_with_metadata(audio_folder):
    corpus = load_corpus(str(audio_folder), require_text=True)
    assert corpus["id"] == [f"clip{number}.wav" for number in range(4)]
    assert corpus["text"] == [f"text number {number}" for number in range(4)]
    assert corpus["duration"][0] == pytest.approx(soundfile.info(audio_folder / "clip0.wav").duration)


def test_audio_without_metadata_row_is_kept_without_text(audio_folder, clips):
    soundfile.write(audio_folder / "extra.flac", clips[0], 16000)
    corpus = load_corpus(str(audio_folder), require_text=True)
    assert dict(zip(corpus["id"], corpus["text"]))["extra.flac"] is None


def test_sub_folders_and_jsonl_metadata_make_splits(tmp_path, clips):
    for split in ("train", "dev", "other"):
        (tmp_path / split).mkdir()
        soundfile.write(tmp_path / split / "a.wav", clips[0], 16000)
    line = json.dumps({"file_name": "a.wav", "sentence": "hello"})
    (tmp_path / "dev" / "metadata.jsonl").write_text(line + "\n")
    assert corpus_splits(str(tmp_path)) == ["train", "validation"]
    train = load_corpus(str(tmp_path), "train", text_column="sentence")
    validation = load_corpus(str(tmp_path), "validation", text_column="sentence")
    assert train["id"] == ["other/a.wav", "train/a.wav"]
    assert (validation["id"], validation["text"]) == (["dev/a.wav"], ["hello"])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("a.wav", "train"),
        ("test.wav", "train"),
        ("test/a.wav", "test"),
        ("data/test/a.wav", "test"),
        ("clips/VAL/speaker/a.wav", "validation"),
        ("test_clean/a.wav", "test"),
        ("test2/a.wav", "test"),
        ("test recordings/a.wav", "test"),
        ("testing_room/a.wav", "test"),
        ("testimony/a.wav", "train"),
        ("LibriSpeech/dev-clean/84/a.flac", "validation"),
        ("test.other/a.wav", "test"),
        ("training-data/dev/a.wav", "validation"),
        ("test-corpus/train/a.wav", "train"),
        ("dev-v1.0/train-00000-of-00001.parquet", "train"),
        ("speaker/eval/a.wav", "test"),
        ("data/test-00000-of-00002.parquet", "test"),
        ("validation.parquet", "validation"),
        ("testimony.parquet", "train"),
        ("data/train-00000-of-00001-abc.parquet", "train"),
    ],
)
def test_split_of_a_file(name, split):
    assert split_of(name) == split


def test_nested_splits_are_kept_apart(tmp_path, clips):
    for split in ("train", "test"):
        (tmp_path / "clips" / split).mkdir(parents=True)
        soundfile.write(tmp_path / "clips" / split / f"{split}.wav", clips[0], 16000)
    assert corpus_splits(str(tmp_path)) == ["test", "train"]
    assert load_corpus(str(tmp_path), "train")["id"] == ["clips/train/train.wav"]


def test_clips_of_the_same_name_get_ids_of_their_own(tmp_path, clips):
    table = {"audio": [{"bytes": wav_bytes(clip), "path": "audio.wav"} for clip in clips], "text": [1, 2, 3, 4, 5]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "all.parquet")
    train, validation = load_train_and_validation(str(tmp_path), validation_fraction=0.2)
    assert len(train) + len(validation) == 5
    assert len(set(train["id"]) | set(validation["id"])) == 5
    assert set(train["text"]) | set(validation["text"]) == set("12345")


def test_audio_is_preferred_to_a_stray_parquet_file(audio_folder, caplog):
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), audio_folder / "notes.parquet")
    assert len(load_corpus(str(audio_folder))) == 4
    assert "notes.parquet is not used" in caplog.text


def test_column_that_holds_no_audio_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"audio": [1.5, 2.5]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"the column 'audio' holds .*float64.*, expected audio"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata.csv", b"file_name,text\na.wav,x\n,y\n", "metadata.csv, line 3: file_name is empty"),
        ("metadata.csv", "file_name,text\na.wav,é\n".encode("latin-1"), "metadata.csv is not UTF-8 text"),
        ("metadata.csv", b"path,text\na.wav,x\n", "line 2: no column 'file_name'; it has path, text"),
        ("metadata.jsonl", b'{"file_name": "a.wav"}\n{"text":\n', "metadata.jsonl, line 2: not JSON"),
        ("metadata.csv", b"file_name,text\na.wav,Hello, world\n", "line 2: more fields than the header has; quote"),
        ("metadata.jsonl", b'["a.wav"]\n', "line 1: no column 'file_name'; it has list"),
        ("metadata.jsonl", b'{"file_name": 1}\n', "line 1: file_name is 1, expected a path"),
        ("metadata.csv", b'file_name,text\na.wav,x\nb.wav,"y\nc.wav,z\n', "line 3: unexpected end of data; a field"),
        (
            "metadata.csv",
            b'file_name,text\na.wav,"x" y\n',
            "line 2: .* expected after .*, and those within are doubled",
        ),
    ],
)
def test_bad_metadata_is_named_by_file_and_line(file, content, message, tmp_path, clips):
    soundfile.write(tmp_path / "a.wav", clips[0], 16000)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_corpus(str(tmp_path))


def test_metadata_may_name_files_by_other_paths(tmp_path, clips):
    (tmp_path / "clips").mkdir()
    (tmp_path / "meta").mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", clips[0], 16000)
    (tmp_path / "meta" / "metadata.csv").write_text("file_name,text\n../clips/a.wav,hello\n")
    corpus = load_corpus(str(tmp_path))
    assert (corpus["id"], corpus["text"]) == (["clips/a.wav"], ["hello"])


def test_metadata_of_a_split_decide_for_audio_that_is_in_none(tmp_path, clips):
    (tmp_path / "wavs").mkdir()
    for number in range(3):
        soundfile.write(tmp_path / f"wavs/{number}.wav", clips[number], 16000)
    for number, split in enumerate(("train", "dev", "test")):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n../wavs/{number}.wav,{split}\n")
    assert corpus_splits(str(tmp_path)) == ["test", "train", "validation"]
    assert [load_corpus(str(tmp_path), split)["id"] for split in ("train", "validation", "test")] == [
        ["wavs/0.wav"], ["wavs/1.wav"], ["wavs/2.wav"],
    ]  # fmt: skip
    (tmp_path / "test/metadata.csv").write_text("file_name,text\n../wavs/1.wav,x\n")
    with pytest.raises(ValueError, match="test/metadata.csv: wavs/1.wav is named in the metadata of split validation"):
        corpus_splits(str(tmp_path))


def test_absolute_paths_into_the_folder_are_files_of_it(tmp_path, clips):
    folder = tmp_path / "dev/corpus"
    folder.mkdir(parents=True)
    for number in range(2):
        soundfile.write(folder / f"{number}.wav", clips[number], 16000)
    soundfile.write(tmp_path / "dev/2.wav", clips[2], 16000)
    names = [folder / "0.wav", folder / "1.wav", tmp_path / "dev/2.wav"]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{name},text\n" for name in names))
    corpus = load_corpus(str(folder))
    assert corpus["id"] == ["0.wav", "1.wav", str(names[2])]
    assert corpus["text"] == ["text"] * 3
    (tmp_path / "dev/test").mkdir()
    os.rename(names[2], tmp_path / "dev/test/2.wav")
    (folder / "metadata.csv").write_text(f"file_name,text\n{tmp_path}/dev/test/2.wav,text\n")
    assert corpus_splits(str(folder)) == ["test", "train"]


def test_metadata_may_write_names_in_another_form(tmp_path, clips, caplog):
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "cle\u0301.wav", clips[0], 16000)  # as macOS writes it
    text = "a" * 200_000
    rows = ["file_name,text", ".\\clips\\cl\u00e9.wav,first", f"clips/cl\u00e9.wav,{text}"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    assert load_corpus(str(tmp_path), require_text=True)["text"] == [text]
    assert "name files again, 1 times: what is said last holds" in caplog.text


def test_audio_that_is_not_read_is_named(audio_folder, tmp_path, caplog):
    for name in ("a.m4a", "b.M4A", "notes.txt"):
        (audio_folder / name).write_bytes(b"x")
    (audio_folder / "linked").symlink_to(tmp_path)
    (audio_folder / "moved.wav").symlink_to(tmp_path / "gone.wav")
    for suffix, format in (("sph", "NIST"), ("aifc", "AIFF")):
        soundfile.write(audio_folder / f"clip.{suffix}", np.ones(16000), 16000, format=format)
    assert len(load_corpus(str(audio_folder))) == 6
    assert f"skipped 2 × .m4a of {audio_folder.name}: convert them" in caplog.text
    assert "skipped linked: links to folders are not followed" in caplog.text
    assert f"skipped 1 links to nothing in {audio_folder.name}, such as moved.wav" in caplog.text


def test_metadata_without_suffixes_are_told_what_is_there(audio_folder, caplog):
    (audio_folder / "metadata.csv").write_text("file_name,text\nclip0,a\nCLIP1.WAV,b\nother.wav,c\nclip2.wav,d")
    assert "d" in load_corpus(str(audio_folder), require_text=False)["text"][:]
    assert "name 2 files that are not there where one of nearly that name is, as clip0 for clip0.wav" in caplog.text


def test_a_name_that_is_not_utf8_is_skipped_and_logged(audio_folder, caplog):
    os.rename(audio_folder / "clip3.wav", os.fsencode(audio_folder) + b"/caf\xe9.wav")
    assert len(load_corpus(str(audio_folder), require_text=False)) == 3
    assert r"skipped 'caf\udce9.wav': its name is not UTF-8" in caplog.text


def test_a_parquet_folder_may_have_the_signs_of_patterns_in_its_name(tmp_path, clips):
    (tmp_path / "corpus [v2]*").mkdir()
    table = {"audio": [{"bytes": wav_bytes(clips[0]), "path": "a.wav"}], "text": ["a"]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "corpus [v2]*/train.parquet")
    assert load_corpus(str(tmp_path / "corpus [v2]*"))["text"] == ["a"]


def test_parquet_folder_with_splits_and_other_column_names(tmp_path, clips):
    for split, rows in (("train", 3), ("test", 1)):
        table = {
            "speech": [{"bytes": wav_bytes(clips[row]), "path": f"{split}{row}.wav"} for row in range(rows)],
            "sentence": [f"words {row}" for row in range(rows)],
        }
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = load_corpus(str(tmp_path), "train", audio_column="speech", text_column="sentence")
    assert corpus.column_names == ["id", "audio", "text", "duration"]
    assert (len(corpus), corpus["text"][2], corpus["id"][2]) == (3, "words 2", "train2.wav")
    assert corpus["duration"][1] == pytest.approx(len(clips[1]) / 16000)
    single = load_corpus(str(tmp_path / "test-00000-of-00001.parquet"), "test", audio_column="speech")
    assert single["id"] == ["test0.wav"]


def test_shards_of_a_parquet_folder_may_have_unlike_columns(tmp_path, clips):
    audio = [[{"bytes": wav_bytes(clip), "path": f"{name}.wav"}] for clip, name in zip(clips, "abcd")]
    shards = [
        {"audio": pyarrow.array(audio[0])[:0], "text": pyarrow.array([], pyarrow.string())},
        {"audio": audio[1], "text": ["b"], "take": [1]},
        {"audio": audio[2], "text": ["c"], "speaker": ["ann"], "take": ["second"], "duration": [len(clips[2]) / 16000]},
        {"audio": audio[3], "text": ["d"]},
    ]
    for number, shard in enumerate(shards):
        pyarrow.parquet.write_table(pyarrow.table(shard), tmp_path / f"train-{number}.parquet")
    corpus = load_corpus(str(tmp_path), keep_columns=["speaker"])
    assert (corpus["text"][:], corpus["speaker"][:]) == (["b", "c", "d"], [None, "ann", None])
    assert corpus["duration"][:] == pytest.approx([len(clip) / 16000 for clip in clips[1:4]])
    with pytest.raises(ValueError, match=r"train-1.parquet has no column 'speaker'; it has audio, text, take"):
        load_corpus(str(tmp_path), label_column="speaker")
    (tmp_path / "train-4.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="train-4.parquet cannot be read as parquet"):
        load_corpus(str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "train-0.parquet").rename(tmp_path / "empty/train.parquet")
    with pytest.raises(ValueError, match="empty: train.parquet has no rows"):
        load_corpus(str(tmp_path / "empty"))


def test_durations_in_another_unit_are_measured_instead(tmp_path, clips, caplog):
    table = {
        "audio": [{"bytes": wav_bytes(clip), "path": None} for clip in clips],
        "duration": [len(clip) / 16.0 for clip in clips],  # milliseconds
    }
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    corpus = load_corpus(str(tmp_path))
    assert corpus["duration"] == pytest.approx([len(clip) / 16000 for clip in clips])
    assert corpus["id"] == ["0", "1", "2", "3", "4"]
    assert "durations are read from the audio instead" in caplog.text


def test_labels_come_from_a_column_of_metadata_or_parquet(audio_folder, tmp_path, clips):
    lines = ["file_name,text,speaker", "clip0.wav,a,ann", "clip1.wav,b,bob", "clip2.wav,c,ann", "clip3.wav,d,"]
    (audio_folder / "metadata.csv").write_text("\n".join(lines))
    corpus = load_corpus(str(audio_folder), label_column="speaker")
    assert corpus["label"][:] == ["ann", "bob", "ann", ""]
    dataset = SpeechDataset(corpus, 16000)
    assert dataset.has_labels
    assert dataset.labels[0] == dataset.labels[2] != dataset.labels[1]
    assert len(set(dataset.labels.tolist())) == 3
    assert dataset[0, 2]["label"] == dataset.labels[2]

    rows = datasets.Dataset.from_dict(
        {"audio": [{"bytes": None, "path": row["audio"]["path"]} for row in corpus], "language": [1, 0, 1, 0]}
    )
    rows = rows.cast_column("language", datasets.ClassLabel(names=["en", "fr"]))
    rows.to_parquet(tmp_path / "train.parquet")
    assert load_corpus(str(tmp_path / "train.parquet"), label_column="language")["label"][:] == ["fr", "en", "fr", "en"]
    assert "label" not in load_corpus(str(audio_folder)).column_names
    unlabelled = SpeechDataset(load_corpus(str(audio_folder)), 16000)
    assert unlabelled.labels.tolist() == [0, 1, 2, 3]
    assert not unlabelled.has_labels
    with pytest.raises(ValueError, match="has no column 'speaker'; it has .*: set label_column"):
        load_corpus(str(tmp_path / "train.parquet"), label_column="speaker")
    with pytest.raises(ValueError, match="no column 'voice'"):
        load_corpus(str(audio_folder), label_column="voice")


def test_several_sources_are_joined(audio_folder):
    corpus = load_corpus([str(audio_folder), "demo"])
    assert len(corpus) == 4 + 406
    assert read_audio(corpus[2]["audio"], 16000).any()
    assert read_audio(corpus[400]["audio"], 16000).any()


def test_bad_files_are_named_and_left_out(audio_folder, clips, caplog):
    for kind in ("empty", "text", "header_only"):
        (audio_folder / f"{kind}.wav").write_bytes(BAD_BYTES[kind][0](clips[0]))
    corpus = load_corpus(str(audio_folder))
    assert len(corpus) == 4
    for kind in ("empty", "text", "header_only"):
        assert f"skipped {kind}.wav: {BAD_BYTES[kind][1]}" in caplog.text
    assert "skipped 3 of 7 files" in caplog.text
    skipped = []
    load_corpus([str(audio_folder), "demo"], skipped=skipped)
    assert sorted(skipped) == ["empty.wav", "header_only.wav", "text.wav"]


def test_a_file_that_metadata_names_but_is_missing_is_left_out(audio_folder, caplog):
    with (audio_folder / "metadata.csv").open("a") as metadata:
        metadata.write("\nghost.wav,boo")
    assert len(load_corpus(str(audio_folder))) == 4
    assert "skipped ghost.wav: no such file" in caplog.text


def test_folder_without_audio_says_what_it_found(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"no audio in .*found 1 × .txt; expected .*\.wav"):
        load_corpus(str(tmp_path))


def test_folder_with_only_bad_audio_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no usable audio"):
        load_corpus(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sources": "/no/such/folder"}, FileNotFoundError, "no folder or file /no/such/folder"),
        ({"sources": "demo", "split": "dev"}, ValueError, "demo has no split 'dev'; it has test, train, validation"),
        ({"sources": "demo", "audio_column": "speech"}, ValueError, "no column 'speech'; it has id, audio, text"),
        ({"sources": "demo", "text_column": "words", "require_text": True}, ValueError, "no column 'words'"),
    ],
)
def test_wrong_source_split_or_column_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        load_corpus(**arguments)


def test_metadata_without_its_column_names_those_it_has(audio_folder):
    with pytest.raises(ValueError, match=r"metadata.csv, line 2: no column 'sentence'; it has file_name, text"):
        load_corpus(str(audio_folder), text_column="sentence", require_text=True)
    assert load_corpus(str(audio_folder), text_column="sentence")["text"] == [None] * 4


def test_folder_without_texts_is_refused_when_texts_are_needed(tmp_path, clips):
    soundfile.write(tmp_path / "a.wav", clips[0], 16000)
    with pytest.raises(ValueError, match="has no text: expected metadata.csv"):
        load_corpus(str(tmp_path), require_text=True)


def test_held_out_clips_stay_held_out_when_a_folder_grows(tmp_path, clips):
    for number in range(30):
        soundfile.write(tmp_path / f"{number}.wav", clips[0], 16000)
    train, validation = load_train_and_validation(str(tmp_path), validation_fraction=0.2)
    assert not set(train["id"]) & set(validation["id"])
    assert len(train) + len(validation) == 30
    for number in range(30, 50):
        soundfile.write(tmp_path / f"{number}.wav", clips[0], 16000)
    _, larger = load_train_and_validation(str(tmp_path), validation_fraction=0.2)
    assert set(validation["id"]) <= set(larger["id"])


@pytest.mark.parametrize(
    ("column", "options"), [("text", {"scored_by": "text"}), ("word", {"label_column": "word", "scored_by": "label"})]
)
def test_held_out_clips_are_of_those_that_can_be_scored(tmp_path, clips, column, options):
    for number in range(30):
        soundfile.write(tmp_path / f"{number}.wav", clips[0], 16000)
    named = [f"{number}.wav,on" for number in range(20, 23)]
    (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,{column}", *named]))
    train, validation = load_train_and_validation(str(tmp_path), validation_fraction=0.1, **options)
    assert len(validation) == 1
    assert validation["id"][0] in ("20.wav", "21.wav", "22.wav")
    assert len(train) == 29
    (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,{column}", named[0]]))
    with pytest.raises(ValueError, match=rf"holds one clip only with a {'text' if column == 'text' else 'label'}, and"):
        load_train_and_validation(str(tmp_path), **options)


# ---- data set ----


def test_long_recordings_are_split_into_parts_that_make_up_the_whole(tmp_path, clips):
    recording = np.concatenate(clips)
    soundfile.write(tmp_path / "long.flac", recording, 16000, subtype="PCM_24")
    dataset = SpeechDataset(load_corpus(str(tmp_path)), 16000, max_seconds=2.0)
    assert dataset.durations.max() <= 2.0
    parts = [dataset[0, index]["input_values"] for index in range(len(dataset))]
    joined = np.concatenate(parts)
    assert abs(len(joined) - len(recording)) <= len(parts)
    assert dataset.hours == pytest.approx(len(recording) / 16000 / 3600)
    np.testing.assert_allclose(to_float32(parts[0]), recording[: len(parts[0])], atol=2**-16)


def test_short_clips_are_left_out_and_counted(audio_folder, caplog):
    soundfile.write(audio_folder / "click.wav", np.full(160, 0.1), 16000)
    assert len(SpeechDataset(load_corpus(str(audio_folder)), 16000, min_seconds=0.1)) == 4
    assert "1 of 5 clips are shorter than 0.1 s" in caplog.text
    with pytest.raises(ValueError, match="all are shorter than min_seconds=100"):
        SpeechDataset(load_corpus(str(audio_folder)), 16000, min_seconds=100)


def test_clip_that_cannot_be_decoded_is_named_and_comes_without_samples(audio_folder, clips, caplog):
    (audio_folder / "broken.flac").write_bytes(wav_bytes(clips[4], format="FLAC")[:3000])
    soundfile.write(audio_folder / "silent.wav", np.zeros(16000), 16000)
    dataset = SpeechDataset(load_corpus(str(audio_folder)), 16000)
    items = {dataset.corpus[int(dataset.rows[i])]["id"]: dataset[0, i]["input_values"] for i in range(len(dataset))}
    assert [name for name, values in items.items() if values is None] == ["broken.flac", "silent.wav"]
    assert "skipped broken.flac: " in caplog.text
    assert "skipped silent.wav: digital silence" in caplog.text
