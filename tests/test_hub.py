"""The real Hub client against a server on this machine."""

import os
import subprocess
import sys

import pytest

from tests.local_hub import FakeHub

LOAD_BY_NAME = """
import sys
from huggingface_hub import HfApi
from hf_speechcl.data.corpora import corpus_splits, load_corpus, load_train_and_validation
from hf_speechcl.data.demo import load_demo

load_demo().push_to_hub("user/prompts")
other = load_demo()["test"].rename_columns({"audio": "speech", "text": "sentence"})
other.push_to_hub("user/other", "clean", split="train")

assert corpus_splits("user/prompts") == ["train", "validation", "test"]
train, validation = load_train_and_validation("user/prompts", require_text=True)
assert (len(train), len(validation)) == (406, 60)
other = load_corpus("user/other:clean", audio_column="speech", text_column="sentence")
assert other.column_names == ["id", "audio", "text", "duration"]
assert len(other) == 83 and other[0]["audio"]["bytes"] and other[0]["text"]
HfApi().create_repo("user/files", repo_type="dataset")
HfApi().upload_folder(repo_id="user/files", repo_type="dataset", folder_path=sys.argv[1])
assert corpus_splits("user/files") == ["train"]
files = load_corpus("user/files", require_text=True)
assert files["text"] == [f"text number {number}" for number in range(4)]
assert min(files["duration"]) > 0

try:
    load_corpus("user/absent")
except Exception as error:
    assert "user/absent" in str(error), error
else:
    raise AssertionError("a data set that is not there was loaded")
"""


@pytest.fixture
def hub(tmp_path):
    hub = FakeHub(tmp_path / "hub").start()
    yield hub
    hub.stop()


def test_corpus_loads_by_its_name_on_the_hub(hub, tmp_path, audio_folder):
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-c", LOAD_BY_NAME, str(audio_folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
