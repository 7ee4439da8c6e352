"""A killed run goes on where it was."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from hf_speechcl import SpeechDataset
from hf_speechcl.training.arguments import PretrainingDataArguments, SpeechTrainingArguments
from hf_speechcl.training.pretrain import main as pretrain
from hf_speechcl.training.pretraining_trainer import PretrainingTrainer
from hf_speechcl.training.resume import describe_clips, find_checkpoint, keep_options
from tests.conftest import FAST_RUN, ROOT, TINY_OPTIONS


def test_a_run_does_not_go_on_under_other_options(tmp_path, monkeypatch):
    def keep(checkpoint, **changes):
        of_training = {"output_dir": str(tmp_path), "seed": 0}
        of_training |= {
            name: changes.pop(name)
            for name in (*of_training, "learning_rate", "optim", "max_grad_norm")
            if name in changes
        }
        args = SpeechTrainingArguments(use_cpu=True, **of_training)
        keep_options(args, checkpoint, PretrainingDataArguments(**changes))

    keep(None)
    checkpoint = str(tmp_path / "checkpoint-1")
    keep(checkpoint)
    with pytest.raises(ValueError, match=r"begun with mask_prob=0.65, now 0.3: give the same"):
        keep(checkpoint, mask_prob=0.3)
    with pytest.raises(ValueError, match=r"seed=0, now 7"):
        keep(checkpoint, seed=7, output_dir=str(tmp_path / "another"))
    assert not (tmp_path / "another").exists()
    with pytest.raises(ValueError, match=r"learning_rate=0.0005, now 0.1"):
        keep(checkpoint, learning_rate=0.1)
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0, now 0.5"):
        keep(checkpoint, max_grad_norm=0.5)
    with pytest.raises(ValueError, match=r"optim=.*, now .*sgd"):
        keep(checkpoint, optim="sgd")
    monkeypatch.setattr(SpeechTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match=r"world_size=1, now 2"):
        keep(checkpoint)
    monkeypatch.undo()
    options = json.loads((tmp_path / "options.json").read_text())
    del options["learning_rate"]  # of a version that kept less
    (tmp_path / "options.json").write_text(json.dumps(options))
    keep(checkpoint)
    keep(None, mask_prob=0.3)


def test_find_checkpoint(tmp_path):
    assert find_checkpoint(str(tmp_path), None) is None
    assert find_checkpoint(str(tmp_path), "last") is None
    (tmp_path / "checkpoint-best").mkdir()
    for step, state in ((8, '{"global_step": 8}'), (9, ""), (10, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
            (folder / "scheduler.pt").touch()
    assert find_checkpoint(str(tmp_path), "last") == str(tmp_path / "checkpoint-8")
    with pytest.raises(
        FileExistsError, match="holds checkpoint-8 of an earlier run: pass --resume_from_checkpoint last"
    ):
        find_checkpoint(str(tmp_path), None)
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-9"))
    assert find_checkpoint(str(tmp_path / "new"), str(tmp_path / "checkpoint-8")) == str(tmp_path / "checkpoint-8")
    assert find_checkpoint(f"{tmp_path}/new/..", str(tmp_path / "checkpoint-8")) == str(tmp_path / "checkpoint-8")
    weights_alone = tmp_path / "weights_alone" / "checkpoint-3"
    weights_alone.mkdir(parents=True)
    (weights_alone / "trainer_state.json").write_text('{"global_step": 3}')
    for folder, wanted in ((tmp_path / "another", str(weights_alone)), (weights_alone.parent, "last")):
        with pytest.raises(FileNotFoundError, match="checkpoint-3 holds no optimizer, as --save_only_model asks"):
            find_checkpoint(str(folder), wanted)
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "model.safetensors").write_bytes(b"")
    for wanted in (None, "last"):
        with pytest.raises(
            FileExistsError, match="holds the model of a finished run without checkpoints: give another"
        ):
            find_checkpoint(str(finished), wanted)
    with pytest.raises(FileExistsError, match="finished holds a model already(?s:.*)to go on from .*checkpoint-8"):
        find_checkpoint(str(finished), str(tmp_path / "checkpoint-8"))


def pretraining_command(output_dir, max_steps, *more):
    return [
        "--output_dir", output_dir, "--max_steps", max_steps, "--objectives", "best_rq=1", "wav2vec2=0.5",
        "--encoder_options", *TINY_OPTIONS, "hidden_dropout=0.1", "layerdrop=0.2", *FAST_RUN,
        "--save_strategy", "steps", *more,
    ]  # fmt: skip


def test_run_killed_and_resumed_ends_with_the_weights_of_an_uninterrupted_run(tmp_path, caplog):
    steps = 55  # past the first epoch's end
    command = pretraining_command(tmp_path / "whole", steps, "--save_steps", 100)
    command[command.index("12")] = "30"
    pretrain([str(part) for part in command])

    command = pretraining_command(tmp_path / "killed", steps, "--save_steps", 25)
    command[command.index("12")] = "30"
    command = [str(part) for part in command]
    script = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *command]
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / "killed" / "checkpoint-25" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    with pytest.raises(FileExistsError, match="pass --resume_from_checkpoint last"):
        pretrain(command)
    pretrain([*command, "--resume_from_checkpoint", "last"])
    assert "resuming from" in caplog.text
    whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_a_finished_run_makes_no_further_update_and_other_clips_are_refused(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        noise = 0.1 * torch.randn(16000, generator=generator)
        soundfile.write(corpus / f"{number}.wav", noise.numpy(), 16000)
    run = tmp_path / "run"
    command = pretraining_command(run, 4, "--save_steps", 2, "--lr_scheduler_type", "constant", "--corpus", corpus)
    command += ["--metric_for_best_model", "best_rq/loss"]
    command = [str(part) for part in command]
    pretrain(command)
    weights = load_file(run / "model.safetensors")
    checkpoints = sorted(path.name for path in run.glob("checkpoint-*"))
    pretrain([*command, "--resume_from_checkpoint", "last"])
    torch.testing.assert_close(load_file(run / "model.safetensors"), weights, rtol=0, atol=0)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == checkpoints == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 4

    with pytest.raises(ValueError, match=r"was begun with metric_for_best_model='best_rq/loss', now 'loss'"):
        pretrain([*command, "--resume_from_checkpoint", "last", "--metric_for_best_model", "eval_loss"])
    shutil.copy(corpus / "0.wav", corpus / "6.wav")
    with pytest.raises(ValueError, match=r"was begun with other clips \(train 5 clips #\w+, now 6 clips #\w+; valid"):
        pretrain([*command, "--resume_from_checkpoint", "last"])
    (corpus / "6.wav").unlink()
    pretrain([*command, "--resume_from_checkpoint", "last"])


def test_clips_are_told_from_the_same_with_other_texts(corpus):
    clips = SpeechDataset(corpus.select(range(3)), 16000)
    described = describe_clips(clips, [[1, 2], [3], [4]])
    assert described == describe_clips(clips, [np.array([1, 2]), [3], [4]])
    assert described != describe_clips(clips, [[1, 2], [3], [5]])


def test_run_with_batches_made_ahead_resumes_within_an_epoch_and_ends_with_the_same_weights(tmp_path, monkeypatch):
    """The thread that is for accelerators, here on a CPU, with validation while it still reads."""
    begin = PretrainingTrainer.__init__

    def begin_ahead(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.makes_ahead = True

    weights = {}
    for run in ("plain", "ahead", "resumed"):
        if run == "ahead":
            monkeypatch.setattr(PretrainingTrainer, "__init__", begin_ahead)
        command = pretraining_command(tmp_path / run, 9, "--save_steps", 5, "--eval_strategy", "steps")
        command += ["--eval_steps", 2]
        if run == "resumed":
            command += ["--resume_from_checkpoint", tmp_path / "ahead" / "checkpoint-5"]
        pretrain([str(part) for part in command])
        weights[run] = load_file(tmp_path / run / "model.safetensors")
    torch.testing.assert_close(weights["ahead"], weights["plain"], rtol=0, atol=0)
    torch.testing.assert_close(weights["resumed"], weights["plain"], rtol=0, atol=0)


def test_a_run_resumed_within_a_later_epoch_ends_with_the_same_weights(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(14):
        noise = 0.1 * torch.randn(4 * 16000, generator=generator)
        soundfile.write(corpus / f"{number}.wav", noise.numpy(), 16000)
    weights = {}
    for run in ("whole", "resumed"):
        command = pretraining_command(tmp_path / run, 12, "--save_steps", 7, "--corpus", corpus)
        command += ["--validation_fraction", "0.15", "--eval_strategy", "no", "--report_to", "none"]
        if run == "resumed":
            command += ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-7"]
        pretrain([str(part) for part in command])
        weights[run] = load_file(tmp_path / run / "model.safetensors")
    epoch = json.loads((tmp_path / "whole" / "checkpoint-7" / "trainer_state.json").read_text())["epoch"]
    assert 1 < epoch < 2
    torch.testing.assert_close(weights["resumed"], weights["whole"], rtol=0, atol=0)


def test_run_that_compares_clips_of_several_micro_batches_resumes_exactly(tmp_path):
    command = ["--max_steps", 6, "--objectives", "info_nce=1", "--gradient_accumulation_steps", 2]
    command += ["--encoder_options", *TINY_OPTIONS, "hidden_dropout=0.3", *FAST_RUN, "--save_strategy", "steps"]
    for run, more in {"whole": ["--save_steps", 4], "resumed": []}.items():
        if run == "resumed":
            more = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4"]
        pretrain([str(part) for part in [*command, "--output_dir", tmp_path / run, *more]])
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
