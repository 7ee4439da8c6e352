"""The index of durations: what is measured again and what is not, and what it survives."""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import soundfile
import torch

from hf_speechcl import load_corpus
from hf_speechcl.data import SpeechDataset, corpora, index
from hf_speechcl.data.audio import AudioError, read_duration
from hf_speechcl.data.corpora import load_train_and_validation
from hf_speechcl.data.folders import INDEX_FILE
from tests.conftest import wav_bytes


@pytest.fixture
def read(monkeypatch, tmp_path):
    """Names or first bytes of the clips whose headers were read since it was last cleared."""
    clips = []

    def read_and_note(audio):
        clips.append(os.path.basename(audio["path"] or "") or audio["bytes"])
        return read_duration(audio)

    monkeypatch.setattr(index, "read_duration", read_and_note)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return clips


def write_parquet(file, clips, **columns):
    audio = [{"bytes": wav_bytes(clip), "path": f"{number}.wav"} for number, clip in enumerate(clips)]
    pyarrow.parquet.write_table(pyarrow.table({"audio": audio, **columns}), file)


# ---- what is measured again ----


def test_headers_are_read_once(audio_folder, read):
    first = load_corpus(str(audio_folder))
    assert sorted(read) == [f"clip{number}.wav" for number in range(4)]
    read.clear()
    again = load_corpus(str(audio_folder))
    assert read == []
    assert again.to_dict() == first.to_dict()


def test_only_new_and_changed_files_of_a_folder_are_read(audio_folder, clips, read):
    load_corpus(str(audio_folder))
    read.clear()
    soundfile.write(audio_folder / "new.wav", clips[4], 16000)
    soundfile.write(audio_folder / "clip2.wav", clips[1], 16000)
    corpus = load_corpus(str(audio_folder))
    assert sorted(read) == ["clip2.wav", "new.wav"]
    seconds = dict(zip(corpus["id"], corpus["duration"]))
    assert seconds["clip2.wav"] == len(clips[1]) / 16000
    assert seconds["new.wav"] == len(clips[4]) / 16000


def test_a_file_of_the_same_size_and_another_time_is_read_again(audio_folder, read):
    load_corpus(str(audio_folder))
    read.clear()
    os.utime(audio_folder / "clip1.wav", ns=(0, 1))
    load_corpus(str(audio_folder))
    assert read == ["clip1.wav"]


def test_files_that_are_gone_leave_the_index(audio_folder, clips):
    load_corpus(str(audio_folder))
    (audio_folder / "clip0.wav").unlink()
    soundfile.write(audio_folder / "new.wav", clips[4], 16000)
    (audio_folder / "metadata.csv").unlink()
    load_corpus(str(audio_folder))
    names = pyarrow.parquet.ParquetFile(audio_folder / INDEX_FILE).read()["name"].to_pylist()
    assert sorted(names) == ["clip1.wav", "clip2.wav", "clip3.wav", "new.wav"]


def test_splits_share_an_index_and_do_not_displace_each_other(tmp_path, clips, read):
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        soundfile.write(tmp_path / "data" / split / f"{split}.wav", clips[0], 16000)
    for split in ("train", "test"):
        load_corpus(str(tmp_path / "data"), split)
    read.clear()
    for split in ("train", "test"):
        load_corpus(str(tmp_path / "data"), split)
    assert read == []


def test_parquet_files_are_measured_one_by_one(tmp_path, clips, read):
    folder = tmp_path / "data"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", clips[:3])
    first = load_corpus(str(folder))
    assert len(read) == 3
    read.clear()
    write_parquet(folder / "train-1.parquet", clips[3:])
    corpus = load_corpus(str(folder))
    assert len(read) == 2
    assert corpus["duration"][:] == [len(clip) / 16000 for clip in clips]
    assert corpus["duration"][:3] == first["duration"][:]
    read.clear()
    write_parquet(folder / "train-0.parquet", clips[2::-1])
    assert load_corpus(str(folder))["duration"][:3] == first["duration"][::-1]
    assert len(read) == 3


def test_another_audio_column_has_entries_of_its_own(tmp_path, clips, read):
    speech, noise = ([{"bytes": wav_bytes(clip), "path": None}] for clip in clips[:2])
    pyarrow.parquet.write_table(pyarrow.table({"speech": speech, "noise": noise}), tmp_path / "a.parquet")
    for _ in range(2):
        for column, clip in (("speech", clips[0]), ("noise", clips[1])):
            corpus = load_corpus(str(tmp_path / "a.parquet"), audio_column=column)
            assert corpus["duration"][:] == [len(clip) / 16000]
    assert len(read) == 2


def test_clips_that_parquet_files_only_point_to_are_always_read(tmp_path, clips, read):
    soundfile.write(tmp_path / "a.wav", clips[0], 16000)
    (tmp_path / "rows").mkdir()
    table = {"audio": [{"bytes": None, "path": str(tmp_path / "a.wav")}]}
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pydict(
            table,
            schema=pyarrow.schema(
                [("audio", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))]
            ),
        ),
        tmp_path / "rows" / "train.parquet",
    )
    load_corpus(str(tmp_path / "rows"))
    soundfile.write(tmp_path / "a.wav", clips[1], 16000)
    assert load_corpus(str(tmp_path / "rows"))["duration"][:] == [len(clips[1]) / 16000]
    assert not (tmp_path / "rows" / INDEX_FILE).exists()


# ---- clips that cannot be used ----


def test_broken_clips_are_named_each_time_and_read_once(audio_folder, read, caplog):
    (audio_folder / "text.wav").write_bytes(b"this is no audio\n" * 100)
    messages = []
    for _ in range(2):
        caplog.clear()
        assert len(load_corpus(str(audio_folder))) == 4
        messages.append([record.getMessage() for record in caplog.records])
    assert messages[0] == messages[1]
    assert "skipped text.wav: not readable as audio" in caplog.text
    assert read.count("text.wav") == 2  # once more, to be sure, before it is remembered


def test_a_passing_fault_is_not_remembered(audio_folder, monkeypatch):
    faults = iter(["cannot be read: the network is down"])

    def fail_once(audio):
        if audio["path"].endswith("clip3.wav") and (fault := next(faults, None)):
            raise AudioError(fault)
        return read_duration(audio)

    monkeypatch.setattr(index, "read_duration", fail_once)
    assert len(load_corpus(str(audio_folder))) == 3
    assert len(load_corpus(str(audio_folder))) == 4


def test_slices_of_a_split_have_durations_of_their_own(tmp_path, clips, monkeypatch):
    write_parquet(tmp_path / "train.parquet", clips[:4])
    files = {"train": str(tmp_path / "train.parquet")}
    monkeypatch.setattr(
        corpora, "_load_named", lambda name, split: datasets.load_dataset("parquet", data_files=files, split=split)
    )
    monkeypatch.setattr(corpora, "_open", lambda name, columns: corpora._Source(name))
    parts = [load_corpus("tester/clips", split)["duration"][:] for split in ("train[:50%]", "train[50%:]")]
    assert parts == [[len(clip) / 16000 for clip in clips[first : first + 2]] for first in (0, 2)]


def test_measuring_leaves_the_generator_of_torch_alone(audio_folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_corpus(str(audio_folder))
    assert torch.rand(1) == expected


def test_a_missing_file_is_found_when_it_comes(audio_folder, clips):
    with (audio_folder / "metadata.csv").open("a") as metadata:
        metadata.write("\nlate.wav,boo")
    assert len(load_corpus(str(audio_folder))) == 4
    soundfile.write(audio_folder / "late.wav", clips[0], 16000)
    assert "late.wav" in load_corpus(str(audio_folder))["id"][:]


# ---- where it is, and what it survives ----


@pytest.mark.parametrize("content", [b"", b"PAR1 but no parquet", "foreign", "other version", "cut"])
def test_a_damaged_or_foreign_index_is_written_anew(content, audio_folder, read, caplog):
    expected = load_corpus(str(audio_folder)).to_dict()
    file = audio_folder / INDEX_FILE
    whole = file.read_bytes()
    if content == "foreign":
        pyarrow.parquet.write_table(pyarrow.table({"name": ["clip0.wav"], "seconds": [99.0]}), file)
    elif content == "other version":
        table = pyarrow.parquet.ParquetFile(file).read()
        pyarrow.parquet.write_table(table.replace_schema_metadata({"hf_speechcl": "durations 0"}), file)
    else:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    read.clear()
    assert load_corpus(str(audio_folder)).to_dict() == expected
    assert len(read) == 4
    assert f"{INDEX_FILE} is not used and written anew" in caplog.text
    read.clear()
    assert load_corpus(str(audio_folder)).to_dict() == expected
    assert read == []


def test_a_folder_marked_read_only_stays_as_it_is(audio_folder, read, tmp_path):
    before = sorted(os.listdir(audio_folder))
    audio_folder.chmod(0o555)
    try:
        load_corpus(str(audio_folder))
        read.clear()
        load_corpus(str(audio_folder))
        assert read == []
        assert sorted(os.listdir(audio_folder)) == before
        assert len(list((tmp_path / "cache" / "hf_speechcl").iterdir())) == 1
    finally:
        audio_folder.chmod(0o755)


def test_a_corpus_is_read_where_no_index_can_be_written(audio_folder, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    audio_folder.chmod(0o555)
    try:
        assert len(load_corpus(str(audio_folder))) == 4
    finally:
        audio_folder.chmod(0o755)
    assert "durations cannot be kept" in caplog.text


def test_an_index_goes_with_its_folder_and_names_none(audio_folder, read, tmp_path):
    (audio_folder / "text.wav").write_bytes(b"this is no audio")
    load_corpus(str(audio_folder))
    table = pyarrow.parquet.ParquetFile(audio_folder / INDEX_FILE).read()
    assert str(tmp_path) not in str(table.to_pydict()) + str(table.schema)
    read.clear()
    shutil.move(audio_folder, tmp_path / "moved")
    load_corpus(str(tmp_path / "moved"))
    assert read == []


@pytest.mark.parametrize("is_absolute", [True, False])
def test_paths_out_of_the_folder_are_not_kept(is_absolute, tmp_path, clips):
    soundfile.write(tmp_path / "a.wav", clips[0], 16000)
    (tmp_path / "corpus").mkdir()
    name = tmp_path / "a.wav" if is_absolute else "../a.wav"
    (tmp_path / "corpus" / "metadata.csv").write_text(f"file_name,text\n{name},hello\n")
    corpus = load_corpus(str(tmp_path / "corpus"))
    assert (len(corpus), corpus["text"][:]) == (1, ["hello"])
    assert not (tmp_path / "corpus" / INDEX_FILE).exists()


def test_the_index_is_no_part_of_the_corpus(tmp_path, clips, caplog):
    (tmp_path / "data" / "train").mkdir(parents=True)
    write_parquet(tmp_path / "data" / "train" / "a.parquet", clips[:2])
    load_corpus(str(tmp_path / "data" / "train"))
    assert (tmp_path / "data" / "train" / INDEX_FILE).exists()
    assert len(load_corpus(str(tmp_path / "data"))) == 2
    soundfile.write(tmp_path / "data" / "b.wav", clips[0], 16000)
    load_corpus(str(tmp_path / "data"))
    assert INDEX_FILE not in caplog.text


def test_starts_at_the_same_time_do_not_disturb_each_other(audio_folder, read):
    expected = load_corpus(str(audio_folder)).to_dict()
    (audio_folder / INDEX_FILE).unlink()
    with ThreadPoolExecutor(6) as pool:
        corpora = list(pool.map(lambda _: load_corpus(str(audio_folder)).to_dict(), range(12)))
    assert all(corpus == expected for corpus in corpora)
    assert [name for name in os.listdir(audio_folder) if name.startswith(INDEX_FILE)] == [INDEX_FILE]
    read.clear()
    load_corpus(str(audio_folder))
    assert read == []


def test_an_interrupted_start_keeps_what_it_measured(audio_folder, monkeypatch):
    monkeypatch.setattr(index, "CLIPS_PER_WRITE", 2)
    asked = []

    def stop(audio):
        asked.append(audio)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return read_duration(audio)

    monkeypatch.setattr(index, "read_duration", stop)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(str(audio_folder))
    kept = len(pyarrow.parquet.ParquetFile(audio_folder / INDEX_FILE).read())
    assert kept >= 1
    asked.clear()
    asked += [None] * 4
    assert len(load_corpus(str(audio_folder))) == 4
    assert len(asked) == 4 + 4 - kept


def test_processes_measure_what_one_process_would(audio_folder, monkeypatch):
    (audio_folder / "text.wav").write_bytes(b"this is no audio")
    expected = load_corpus(str(audio_folder)).to_dict()
    (audio_folder / INDEX_FILE).unlink()
    monkeypatch.setattr(index, "CLIPS_WITHOUT_WORKERS", 0)
    monkeypatch.setattr(index, "CLIPS_PER_TASK", 2)
    read_duration = index.read_duration

    def read_in_process(audio):
        (audio_folder.parent / f"read_by_{os.getpid()}").touch()
        return read_duration(audio)

    monkeypatch.setattr(index, "read_duration", read_in_process)
    assert load_corpus(str(audio_folder)).to_dict() == expected
    others = {path.name for path in audio_folder.parent.glob("read_by_*")} - {f"read_by_{os.getpid()}"}
    assert others or sys.platform != "linux"


# ---- many rows ----


def test_validation_clips_of_a_folder_are_the_same_with_the_index(audio_folder):
    first = load_train_and_validation(str(audio_folder), 0.3)
    again = load_train_and_validation(str(audio_folder), 0.3)
    assert [part.to_dict() for part in first] == [part.to_dict() for part in again]


def test_no_row_is_looked_at_to_set_up_a_data_set(corpus, monkeypatch):
    expected = sum(corpus["duration"][:])

    def look(*_, **__):
        raise AssertionError("a row was read")

    for name in ("__iter__", "_getitem"):
        monkeypatch.setattr(datasets.Dataset, name, look)
    assert SpeechDataset(corpus, 16000, max_seconds=2.0).durations.sum() == pytest.approx(expected)
