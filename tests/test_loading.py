"""Folders load as transformers users expect: with the package, without it, and through the pipeline."""

import os
import subprocess
import sys

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForPreTraining,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from hf_speechcl import (
    SpeechCLConfig,
    SpeechCLForCTC,
    SpeechCLForPreTraining,
    SpeechCLForSequenceClassification,
    SpeechCLModel,
)
from hf_speechcl.ctc import build_processor
from hf_speechcl.data.collators import pad_waveforms
from hf_speechcl.evaluation.few_shot import PrototypicalClassifier
from hf_speechcl.features import HiddenStates
from hf_speechcl.hub import read_config
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import FAST_RUN, SMALL_OBJECTIVES, TINY


@pytest.fixture
def pretrained_folder(pretraining_config, tmp_path):
    SpeechCLForPreTraining(pretraining_config).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


SLIDING_WINDOW = 8


@pytest.fixture
def ctc_folder(tmp_path):
    """A CTC model and its processor; what a frame sees ends 2 x 8 frames, 0.64 s, and the convolutions away from it."""
    processor = build_processor(["abcdefgh ijklmnop qrstuvwx yz'"], 16000)
    config = SpeechCLConfig(**TINY, vocab_size=len(processor.tokenizer), sliding_window=SLIDING_WINDOW)
    model = SpeechCLForCTC(config)
    with torch.no_grad():
        for layer in model.speechcl.layers:
            layer.attention.o_proj.weight.mul_(20)
    model.save_pretrained(tmp_path / "ctc")
    processor.save_pretrained(tmp_path / "ctc")
    return tmp_path / "ctc"


def test_pretraining_folder_loads_whole_again(pretrained_folder, pretraining_config):
    first = AutoModelForPreTraining.from_pretrained(pretrained_folder)
    second = SpeechCLForPreTraining.from_pretrained(pretrained_folder)
    assert isinstance(first, SpeechCLForPreTraining)
    torch.testing.assert_close(dict(first.state_dict()), dict(second.state_dict()), rtol=0, atol=0)
    assert first.config.objectives == SMALL_OBJECTIVES


def test_body_of_a_pretraining_folder_loads_without_a_warning(pretrained_folder, caplog):
    transformers_logging.enable_propagation()
    body = AutoModel.from_pretrained(pretrained_folder)
    transformers_logging.disable_propagation()
    assert caplog.text == ""
    assert type(body) is SpeechCLModel
    expected = SpeechCLForPreTraining.from_pretrained(pretrained_folder).speechcl.state_dict()
    torch.testing.assert_close(dict(body.state_dict()), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("auto_class", [AutoModelForCTC, AutoModelForAudioClassification])
def test_only_the_new_head_is_missing_from_a_pretraining_folder(auto_class, pretrained_folder):
    model, info = auto_class.from_pretrained(pretrained_folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(not key.startswith("speechcl.") for key in info["missing_keys"])
    expected = SpeechCLForPreTraining.from_pretrained(pretrained_folder).speechcl.state_dict()
    torch.testing.assert_close(dict(model.speechcl.state_dict()), dict(expected), rtol=0, atol=0)


def test_new_objectives_on_a_trained_body_are_drawn_not_garbage(pretrained_folder):
    config = SpeechCLConfig.from_pretrained(pretrained_folder, objectives={"wav2vec2": {}})
    body = SpeechCLForPreTraining.from_pretrained(pretrained_folder).speechcl
    model = SpeechCLForPreTraining.from_pretrained(pretrained_folder, config=config, ignore_mismatched_sizes=True)
    torch.testing.assert_close(dict(model.speechcl.state_dict()), dict(body.state_dict()), rtol=0, atol=0)
    weights = model.objectives["wav2vec2"].quantizer.weight_proj.weight
    assert weights.std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("model_class", [SpeechCLModel, SpeechCLForCTC, SpeechCLForSequenceClassification])
def test_constants_that_are_not_saved_are_right_after_loading(model_class, config, tmp_path):
    model = model_class(config)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    found, expected = (getattr(part, "speechcl", part).log_mel for part in (loaded, model))
    for name in ("window", "filters"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0, msg=name)


def test_changed_fields_of_a_folder_are_checked_as_those_of_a_new_model(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert read_config("mine", str(tmp_path), sliding_window=None).sliding_window is None
    with pytest.raises(StrictDataclassError, match="sliding_window must be positive or None, found 0"):
        read_config("mine", str(tmp_path), sliding_window=0)


def test_the_teacher_of_a_loaded_model_is_not_trained(tmp_path):
    config = SpeechCLConfig(**TINY, objectives={"data2vec": {"top_layers": 1}})
    SpeechCLForPreTraining(config).save_pretrained(tmp_path)
    for model in (SpeechCLForPreTraining(config), SpeechCLForPreTraining.from_pretrained(tmp_path)):
        is_trained = {name: p.requires_grad for name, p in model.named_parameters() if ".teacher." in name}
        assert is_trained
        assert not any(is_trained.values())


def test_config_survives_a_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path).inputs_to_logits_ratio == 640


WITHOUT_PACKAGE = """
import sys, torch, numpy as np

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_speechcl" or name.startswith("hf_speechcl."):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
from transformers import AutoModel, AutoModelForAudioClassification, AutoModelForCTC, pipeline

folder, clip, output = sys.argv[1:]
values = torch.from_numpy(np.load(clip))[None]
outputs = {
    "hidden": AutoModel.from_pretrained(folder, trust_remote_code=True)(values).last_hidden_state,
    "logits": AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)(values).logits,
}
recognizer = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True)
outputs["text"] = recognizer(np.load(clip))["text"]
assert not any(name.startswith("hf_speechcl") for name in sys.modules)
torch.save(outputs, output)
AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
try:
    AutoModelForCTC.from_pretrained(folder, trust_remote_code=False)
except (ValueError, KeyError) as error:
    print("refused", error)
"""


def test_outputs_without_the_package_equal_those_with_it(ctc_folder, clips, tmp_path):
    np.save(tmp_path / "clip.npy", clips[2])
    command = [sys.executable, "-c", WITHOUT_PACKAGE, ctc_folder, tmp_path / "clip.npy", tmp_path / "outputs.pt"]
    result = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert result.returncode == 0, result.stderr
    assert "refused" in result.stdout
    outputs = torch.load(tmp_path / "outputs.pt")
    values = torch.from_numpy(clips[2])[None]
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(ctc_folder)(values).last_hidden_state
        logits = AutoModelForCTC.from_pretrained(ctc_folder)(values).logits
    torch.testing.assert_close(outputs["hidden"], hidden, rtol=0, atol=0)
    torch.testing.assert_close(outputs["logits"], logits, rtol=0, atol=0)
    assert outputs["text"] == pipeline("automatic-speech-recognition", model=str(ctc_folder))(clips[2])["text"]
    assert outputs["text"]


def test_shipped_files_import_only_torch_and_transformers(ctc_folder):
    allowed = {
        "dataclasses",
        "math",
        "shutil",
        "pathlib",
        "torch",
        "transformers",
        "huggingface_hub",
        ".configuration_speechcl",
    }
    for name in ("configuration_speechcl.py", "modeling_speechcl.py"):
        lines = (ctc_folder / name).read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.startswith(("import ", "from "))]
        assert {module if module.startswith(".") else module.split(".")[0] for module in imports} <= allowed


@pytest.fixture
def recognizer(ctc_folder):
    return pipeline("automatic-speech-recognition", model=str(ctc_folder))


def test_pipeline_reads_arrays_files_and_batches_alike(recognizer, clips, tmp_path):
    texts = [recognizer(clip)["text"] for clip in clips]
    assert len(set(texts)) == len(clips)
    assert [output["text"] for output in recognizer(list(clips), batch_size=3)] == texts
    model = recognizer.model
    logits = model(**pad_waveforms(clips)).logits
    assert recognizer.tokenizer.batch_decode(logits.argmax(-1)) == texts
    assert recognizer({"raw": clips[0], "sampling_rate": 16000})["text"] == texts[0]


def test_pipeline_reads_files(recognizer, clips, tmp_path, monkeypatch):
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())  # the pipeline opens files with ffmpeg
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    soundfile.write(tmp_path / "clip.wav", clips[1], 16000, subtype="FLOAT")
    assert recognizer(str(tmp_path / "clip.wav"))["text"] == recognizer(clips[1])["text"]


@pytest.mark.parametrize("chunk_length_s", [5, 10, 20])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_stitched_minute_gives_the_text_of_the_whole(recognizer, clips, chunk_length_s, batch_size):
    recording = np.resize(np.concatenate(clips), 60 * 16000 + 333)
    whole = recognizer(recording)["text"]
    stitched = recognizer(recording, chunk_length_s=chunk_length_s, stride_length_s=1, batch_size=batch_size)["text"]
    assert len(whole) > 300
    assert stitched == whole
    # A stride shorter than what a frame sees must show: else attention would not matter to this test.
    assert recognizer(recording, chunk_length_s=1, stride_length_s=0.08)["text"] != whole


@pytest.mark.parametrize("kind", ["char", "word"])
def test_timestamps_cover_the_text_in_order_within_the_clip(recognizer, clips, kind):
    output = recognizer(clips[3], return_timestamps=kind)
    chunks = output["chunks"]
    seconds = len(clips[3]) / 16000
    joined = (
        "".join(chunk["text"] for chunk in chunks) if kind == "char" else " ".join(chunk["text"] for chunk in chunks)
    )
    assert joined.split() == output["text"].split()
    times = [time for chunk in chunks for time in chunk["timestamp"]]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= seconds + 0.04
    assert times[-1] > 0.5 * seconds


def test_timestamps_fall_where_the_tokens_are(recognizer, clips):
    model = recognizer.model
    frames = model(torch.from_numpy(clips[3])[None]).logits.argmax(-1)[0].tolist()
    first = next(number for number, token in enumerate(frames) if token > 2)
    chunk = recognizer(clips[3], return_timestamps="char")["chunks"]
    start = next(part["timestamp"][0] for part in chunk if part["text"].strip())
    assert start == pytest.approx(first * 0.04, abs=1e-6)


def test_another_sampling_rate_is_refused_by_the_extractor(recognizer, clips):
    with pytest.raises(ValueError, match="16000"):
        recognizer.feature_extractor(clips[0], sampling_rate=8000)


def test_weights_that_would_be_unpickled_are_not_loaded(config, tmp_path):
    model = SpeechCLModel(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (PrototypicalClassifier, lambda folder: HiddenStates.load(folder, None, "cpu")):
        with pytest.raises(OSError, match="model.safetensors"):
            load(str(tmp_path))
    run = [*FAST_RUN, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    for script, option in ((pretrain, "--encoder"), (finetune_ctc, "--model")):
        with pytest.raises(OSError, match="model.safetensors"):
            script([*run, option, str(tmp_path)])
