"""What runs on a CUDA device: `pytest -m gpu`."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_speechcl import SpeechCLForCTC, SpeechCLForPreTraining
from hf_speechcl.recognizer import SpeechRecognizer
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import FAST_RUN, TINY_OPTIONS, make_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(folder: Path) -> list[str]:
    """Options of a run of seconds on the device."""
    return ["--output_dir", str(folder), "--bf16", "True", *(option for option in FAST_RUN if option != "--use_cpu")]


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Between the weights of two models, buffers of real numbers included."""
    real = [name for name, weight in others.items() if weight.is_floating_point()]
    return sum((some[name] - others[name]).square().sum().item() for name in real) ** 0.5


def test_every_objective_has_the_losses_and_gradients_of_the_cpu(pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config).eval()
    batch = make_batch(model, clips)
    found = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad()
        output = model(**{name: values.to(device) for name, values in batch.items()})
        output.loss.backward()
        gradients = {
            name: weight.grad.cpu().clone() for name, weight in model.named_parameters() if weight.grad is not None
        }
        found.append(({name: part.loss.item() for name, part in output.objectives.items()}, gradients))
    (cpu_losses, cpu_gradients), (gpu_losses, gpu_gradients) = found
    assert gpu_losses == pytest.approx(cpu_losses, rel=1e-3)
    assert gpu_gradients.keys() == cpu_gradients.keys()
    for name, gradient in cpu_gradients.items():
        assert (gpu_gradients[name] - gradient).norm() <= 1e-2 * gradient.norm() + 1e-4, name


def test_pretraining_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    argv = ["--encoder_options", *TINY_OPTIONS, "--objectives", "best_rq", "wav2vec2", "data2vec"]
    pretrain([*argv, "--max_steps", "6", *on_gpu(tmp_path / "whole")])
    saving = [*on_gpu(tmp_path / "resumed"), "--save_strategy", "steps", "--save_steps", "3", "--max_steps", "6"]
    pretrain([*argv, *saving])
    (tmp_path / "resumed/model.safetensors").unlink()
    shutil.rmtree(tmp_path / "resumed/checkpoint-6")
    halfway = load_file(tmp_path / "resumed/checkpoint-3/model.safetensors")
    forward, batches = SpeechCLForPreTraining.forward, []

    @functools.wraps(forward)
    def counted(self, *args, **kwargs):
        batches.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SpeechCLForPreTraining, "forward", counted)
    pretrain([*argv, *saving, "--resume_from_checkpoint", "last"])
    assert sum(batches) == 3
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert distance(resumed, whole) <= 0.2 * distance(halfway, whole)


def test_a_recognizer_is_trained_and_writes_what_it_writes_on_the_cpu(trained, clips, tmp_path):
    finetune_ctc(["--model", str(trained / "encoder"), "--max_steps", "6", *on_gpu(tmp_path / "ctc")])
    assert all(loss > 0 for loss in losses(tmp_path / "ctc"))
    model = SpeechCLForCTC.from_pretrained(tmp_path / "ctc")
    with torch.no_grad():  # after six updates it would write nothing
        model.lm_head.bias[model.config.pad_token_id] -= 10.0
    model.save_pretrained(tmp_path / "ctc")
    texts = []
    for device in ("cpu", "cuda"):
        recognizer = SpeechRecognizer.from_pretrained(tmp_path / "ctc", device=torch.device(device))
        texts.append([transcript.text for transcript in recognizer.transcribe(clips)])
    assert all(texts[0])
    assert texts[0] == texts[1]
