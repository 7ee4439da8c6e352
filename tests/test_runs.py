"""Every objective from the command line: it learns, it stays healthy, it resumes exactly, and its folder loads."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCTC

from hf_speechcl import OBJECTIVES
from hf_speechcl.training.make_units import main as make_units
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import COMPARING, ROOT

# A run of 100 updates that takes seconds; so few want a quicker teacher, and 2 minutes of audio few codes.
OPTIONS = {
    "data2vec": "--objective_options data2vec.ema_decay_start=0.99 data2vec.ema_decay_end=0.999",
    "best_rq": "--objective_options best_rq.codebook_size=64",
    "wav2vec2": "--objective_options wav2vec2.num_negatives=20 wav2vec2.codebook_size=40",
    "denoising": "--corruptions noise=1",
    "siamese": "--max_seconds_per_batch 16 --learning_rate 3e-4",
}
RUN = (
    "--encoder_options hidden_size=64 num_hidden_layers=2 num_attention_heads=2 intermediate_size=128 conv_dim=64 "
    "hidden_dropout=0.1 --use_cpu --disable_tqdm True --report_to none --max_seconds_per_batch 8 --max_steps 100 "
    "--save_steps 80 --eval_on_start True --eval_steps 100 --logging_steps 50 --learning_rate 1e-3"
).split()
GAIN_ALONE = ["--view_augmentations", "gain=1"]


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units") / "mfcc"
    make_units(["--output_dir", str(folder), "--num_units", "20"])
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_learns_resumes_exactly_and_loads(name, tmp_path, request):
    command = [*RUN, "--objectives", f"{name}=1", *OPTIONS.get(name, "").split()]
    command += GAIN_ALONE if name in COMPARING else []
    if name == "hubert":
        command += ["--units", str(request.getfixturevalue("units"))]
    whole, again = tmp_path / "whole", tmp_path / "again"
    pretrain([*command, "--output_dir", str(whole)])

    log = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert json.loads((whole / "results.json").read_text())["eval_guard/verdict"] == 0
    assert "collapse guard: healthy" in (whole / "README.md").read_text()

    shutil.copytree(whole / "checkpoint-80", again / "checkpoint-80")
    pretrain([*command, "--output_dir", str(again), "--resume_from_checkpoint", "last"])
    torch.testing.assert_close(
        load_file(again / "model.safetensors"), load_file(whole / "model.safetensors"), rtol=0, atol=0
    )

    if name == "data2vec":
        checkpoint = load_file(whole / "checkpoint-80" / "model.safetensors")
        teacher = "objectives.data2vec.teacher.norm.bias"
        assert not torch.equal(checkpoint[teacher], load_file(whole / "model.safetensors")[teacher])

    samples = torch.randn(1, 8000)
    encoder, recognizer = AutoModel.from_pretrained(whole), AutoModelForCTC.from_pretrained(whole)
    assert encoder(samples).last_hidden_state.shape == (1, 13, 64)
    torch.testing.assert_close(
        recognizer.speechcl.eval()(samples).last_hidden_state, encoder.eval()(samples).last_hidden_state
    )


def test_labels_noise_corruption_and_accumulation_together(audio_folder, tmp_path, monkeypatch, caplog):
    corrupted = []
    monkeypatch.setattr(
        "hf_speechcl.data.augment.Augmentation._noise",
        lambda self, clip, rng: corrupted.append(self.noise) or clip * 0.5,
    )
    shutil.copytree(audio_folder, audio_folder / "validation")
    speakers = [f"clip{number}.wav,{'ab'[number % 2]}" for number in range(4)]
    for folder in (audio_folder, audio_folder / "validation"):
        (folder / "metadata.csv").write_text("\n".join(["file_name,speaker", *speakers]))
    for number in range(2):
        shutil.copy(audio_folder / "clip0.wav", audio_folder / f"unlabelled{number}.wav")
    options = "--objectives prototypical=1 triplet=1 best_rq=1 denoising=1 --label_column speaker --clips_per_label 2 "
    options += (
        "--corrupt_input --corruptions noise=1 --view_augmentations gain=1 --max_seconds 3 --eval_strategy steps "
    )
    options += (
        "--gradient_accumulation_steps 2 --max_seconds_per_batch 12 --max_steps 2 --eval_steps 1 --save_strategy no"
    )
    sources = ["--corpus", str(audio_folder), "--noise_corpus", str(audio_folder)]
    pretrain([*RUN, *options.split(), *sources, "--output_dir", str(tmp_path / "run")])
    assert "train: 2 of 6 clips have no label and are left out" in caplog.text
    assert corrupted
    assert all(noise is not None for noise in corrupted)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in entry for entry in log) == 4  # at the start, after each update and at the end


def test_clips_without_a_label_are_not_held_out_to_validate_labels_by(audio_folder, tmp_path, caplog):
    for number in range(40):
        shutil.copy(audio_folder / f"clip{number % 4}.wav", audio_folder / f"unlabelled{number}.wav")
    labels = [f"unlabelled{number}.wav,{'ab'[number % 2]}" for number in range(8)]
    (audio_folder / "metadata.csv").write_text("\n".join(["file_name,speaker", *labels]))
    options = "--objectives prototypical=1 --label_column speaker --clips_per_label 2 --max_seconds_per_batch 12"
    options = f"{options} --validation_fraction 0.5 --max_steps 1".split()
    pretrain([*RUN, *GAIN_ALONE, *options, "--corpus", str(audio_folder), "--output_dir", str(tmp_path / "run")])
    assert ": 4 of 44 clips are held out" in caplog.text  # of the eight with one


def test_article_configuration_trains_its_model(tmp_path):
    config = str(ROOT / "scripts" / "configs" / "article.yaml")
    pretrain(["--config", config, "--use_cpu", "--disable_tqdm", "True", "--max_steps", "30", "--eval_on_start", "True"]
             + ["--output_dir", str(tmp_path)])  # fmt: skip
    weights = load_file(tmp_path / "model.safetensors")
    shapes = [tuple(value.shape) for name, value in weights.items() if name.endswith("weight")]
    assert sorted(shapes, reverse=True) == [(64, 128), (32, 64), (16, 32), (8, 16)]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    card = (tmp_path / "README.md").read_text()
    assert "a perceptron of 64, 32 on each frame (10 ms), a linear layer to 16, no Transformer" in card
