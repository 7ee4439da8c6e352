"""The encoder that comes with the package, and how it gets there."""

import importlib
import json
import re
import sys

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from hf_speechcl import SpeechCLForCTC, SpeechCLForPreTraining
from hf_speechcl.evaluation.few_shot import PrototypicalClassifier
from hf_speechcl.features import HiddenStates
from hf_speechcl.hub import STARTER, find_model
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.make_units import main as make_units
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import FAST_RUN, ROOT, TINY_OPTIONS


@pytest.fixture
def pack_starter(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    return importlib.import_module("pack_starter").main


def test_starter_is_small_and_has_a_card_that_names_its_data():
    assert find_model("starter") == str(STARTER)
    features = HiddenStates.load("starter", [6])
    assert features.layers == [6]
    assert PrototypicalClassifier("starter").sampling_rate == 16000
    assert features.encoder.dtype == torch.float32  # its weights are stored in bfloat16
    assert (STARTER / "model.safetensors").stat().st_size < 20e6
    card = (STARTER / "README.md").read_text(encoding="utf-8")
    for source in ("prompts_en", "pool"):
        assert source in card


def test_examples_of_the_card_run(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.wav", clips[1], 16000)
    features, recognizer = re.findall(r"```python\n(.*?)```", (STARTER / "README.md").read_text("utf-8"), re.DOTALL)
    found: dict = {}
    exec(features, found)
    assert found["features"].shape[::2] == (1, 256)
    exec(recognizer, found)
    assert found["model"].config.vocab_size == 32


def test_a_folder_of_that_name_goes_before_the_package(tmp_path, monkeypatch):
    (tmp_path / "starter").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model("starter") == "starter"


def test_starter_is_what_fine_tuning_and_further_pretraining_begin_with(tmp_path):
    body = AutoModel.from_pretrained(STARTER, dtype=torch.float32).state_dict()
    run = [*FAST_RUN, "--max_steps", "1", "--learning_rate", "1e-12", "--weight_decay", "0"]
    finetune_ctc([*run, "--model", "starter", "--head_learning_rate", "1e-12", "--output_dir", str(tmp_path / "ctc")])
    pretrain([*run, "--encoder", "starter", "--output_dir", str(tmp_path / "encoder")])
    for model_class, folder in ((SpeechCLForCTC, "ctc"), (SpeechCLForPreTraining, "encoder")):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
        assert "after all that `starter` was trained on before," in (tmp_path / folder / "README.md").read_text("utf-8")
        model = model_class.from_pretrained(tmp_path / folder)
        for name, value in model.speechcl.state_dict().items():
            torch.testing.assert_close(value, body[name], rtol=1e-5, atol=1e-6, msg=name)


def test_packing_rounds_the_weights_and_nothing_else(pack_starter, tmp_path, capsys):
    folder, packed = tmp_path / "model", tmp_path / "packed"
    pretrain([*FAST_RUN, "--max_steps", "1", "--encoder_options", *TINY_OPTIONS, "--output_dir", str(folder)])
    pack_starter([str(folder), "--output_dir", str(packed)])
    assert "MB" in capsys.readouterr().out
    card = (packed / "README.md").read_text(encoding="utf-8")
    assert 'AutoModel.from_pretrained(find_model("starter"))' in card
    assert "trust_remote_code" not in card
    before, after = (load_file(path / "model.safetensors") for path in (folder, packed))
    buffers = {name for name in before if "quantizer" in name}
    assert buffers
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value if name in buffers else value.bfloat16(), rtol=0, atol=0)
    assert json.loads((packed / "config.json").read_text())["objectives"]
    assert not list(packed.glob("*.py"))
    for name in ("README.md", "preprocessor_config.json"):
        assert (packed / name).is_file()


def test_packed_encoder_goes_on_with_units_of_any_kind(pack_starter, tmp_path):
    folder, packed, units = tmp_path / "model", tmp_path / "packed", tmp_path / "units"
    few = ["--train_split", "validation", "--validation_split", "test"]
    make_units([*few, "--output_dir", str(units), "--num_units", "5"])
    with_units = [*FAST_RUN, *few, "--max_steps", "1", "--objectives", "hubert", "best_rq", "--units", str(units)]
    pretrain([*with_units, "--encoder_options", *TINY_OPTIONS, "--output_dir", str(folder)])
    pack_starter([str(folder), "--output_dir", str(packed)])
    assert list(json.loads((packed / "config.json").read_text())["objectives"]) == ["best_rq"]
    assert not [name for name in load_file(packed / "model.safetensors") if name.startswith("objectives.hubert")]
    others, alone = tmp_path / "others", tmp_path / "alone"
    make_units([*few, "--output_dir", str(others), "--num_units", "7"])
    with_units[-1] = str(others)
    pretrain([*with_units, "--encoder", str(packed), "--output_dir", str(tmp_path / "further")])
    pretrain([*with_units, "--objectives", "hubert", "--encoder_options", *TINY_OPTIONS, "--output_dir", str(alone)])
    with pytest.raises(ValueError, match="was pre-trained with hubert: nothing could go on from it"):
        pack_starter([str(alone), "--output_dir", str(packed)])
    with pytest.raises(ValueError, match="mismatched units"):
        pretrain([*with_units, "--encoder", str(folder), "--output_dir", str(tmp_path / "refused")])


def test_packing_refuses_a_folder_that_could_not_be_published(pack_starter, tmp_path):
    with pytest.raises(FileNotFoundError):
        pack_starter([str(tmp_path), "--output_dir", str(tmp_path / "packed")])
