"""Training and scoring on two processes."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from hf_speechcl.distributed import leaves_launch
from hf_speechcl.evaluation.evaluate import main as evaluate
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import (
    FAST_RUN,
    ROOT,
    TINY_OPTIONS,
    launch,
)
from tests.trainers import (
    KINDS,
    assert_equal,
    gradients,
    make_pretraining_trainer,
    objectives_of,
    quiet_gumbel_softmax,
)


def as_text(*arguments) -> list[str]:
    return [str(argument) for argument in arguments]


def test_a_command_closes_the_process_group_that_it_opened(tmp_path):
    @leaves_launch
    def command():
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)

    command()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/own", rank=0, world_size=1)
    try:
        leaves_launch(lambda: None)()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_gradient_of_one_batch_equals_gradient_of_two_ranks(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.functional, "gumbel_softmax", quiet_gumbel_softmax)
    launch(ROOT / "tests" / "two_ranks.py", tmp_path / "gradients.pt")
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert {kind for kind, _ in found} == set(KINDS)
    for (kind, spread), gradients_found in found.items():
        torch.manual_seed(0)
        trainer = make_pretraining_trainer(corpus, tmp_path, objectives_of(kind))
        whole = gradients(trainer, [trainer.data_collator([trainer.train_dataset[0, i] for i in range(12)])])
        assert_equal(gradients_found, whole, f"{kind}, {spread}")


def test_two_processes_train_and_validate_as_one_that_accumulates(tmp_path):
    common = ["--max_steps", 2, "--encoder_options", *TINY_OPTIONS, *FAST_RUN, "--optim", "sgd"]
    common += ["--learning_rate", 0.1, "--objectives", "best_rq=1", "info_nce=1", "siamese=1"]
    common += ["--eval_strategy", "steps", "--eval_steps", 1]
    common += ["--objective_options", "siamese.form=simsiam", "--view_augmentations", "gain=1"]
    pretrain(as_text(*common, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 4))
    launch(
        ROOT / "scripts" / "pretrain.py", *common, "--output_dir", tmp_path / "two", "--gradient_accumulation_steps", 2
    )
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-3)


def test_two_processes_score_as_one_does_even_if_one_has_no_batch(tmp_path, audio_folder):
    # Four clips in one batch: the second process has nothing to validate or to transcribe.
    lines = [
        "file_name,text",
        *(f"clip{number}.wav,{text}" for number, text in enumerate(["on", "no", "on no", "oo nn"])),
    ]
    (audio_folder / "metadata.csv").write_text("\n".join(lines))
    common = ["--corpus", audio_folder, "--model", "tiny", "--model_options", *TINY_OPTIONS, "--max_steps", 1]
    common += [*FAST_RUN, "--learning_rate", 0, "--head_learning_rate", 0, "--max_seconds_per_batch", 60]
    finetune_ctc(as_text(*common, "--output_dir", tmp_path / "one"))
    launch(ROOT / "scripts" / "finetune_ctc.py", *common, "--output_dir", tmp_path / "two")
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert two["eval_wer"] == one["eval_wer"]
    scores = ["--model", tmp_path / "one", "--corpus", audio_folder, "--split", "train", "--device", "cpu"]
    evaluate(as_text(*scores, "--output_file", tmp_path / "one.json"))
    launch(ROOT / "scripts" / "evaluate.py", *scores, "--output_file", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for results in (one, two):
        del results["real_time_factor"]
        for clip in results["transcripts"]:
            del clip["seconds"]
    assert one == two
