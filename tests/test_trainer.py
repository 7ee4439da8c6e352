"""The trainer's arithmetic, resume after a kill, and more than one process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC, SpeechCLForPreTraining, SpeechDataset, load_corpus
from hf_speechcl.data import CTCCollator
from hf_speechcl.data.audio import AudioError, read_audio, to_float32, to_int16
from hf_speechcl.distributed import leaves_launch
from hf_speechcl.training.arguments import PretrainingDataArguments, SpeechTrainingArguments
from hf_speechcl.training.ctc_trainer import CTCTrainer, CTCTrainingArguments
from hf_speechcl.training.pretrain import main as pretrain
from hf_speechcl.training.pretraining_trainer import PretrainingTrainer
from hf_speechcl.training.trainer import ahead, find_checkpoint, keep_options
from tests.conftest import FAST_RUN, ROOT, SMALL_OBJECTIVES, TINY, TINY_OPTIONS, make_collator, quieter, run_script

VARIANTS = {
    "simsiam": {"siamese": {"form": "simsiam", "proj_dim": 12}},
    "learned temperature": {"info_nce": {"learned_temperature": True, "proj_dim": 12}},
    "all": SMALL_OBJECTIVES,
}
KINDS = [*SMALL_OBJECTIVES, *VARIANTS]


def objectives_of(kind: str) -> dict:
    return VARIANTS.get(kind) or {kind: SMALL_OBJECTIVES[kind]}


def make_pretraining_trainer(corpus, output_dir, objectives=SMALL_OBJECTIVES, **arguments):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))
    dataset = SpeechDataset(corpus.select(range(12)), 16000)
    dataset.labels %= 9  # three pairs of clips are of the same class
    return PretrainingTrainer(
        model=model,
        args=SpeechTrainingArguments(output_dir=str(output_dir), use_cpu=True, report_to="none", **arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=make_collator(model),
        max_seconds_per_batch=8,
    )


def make_ctc_trainer(corpus, output_dir, **arguments):
    model = SpeechCLForCTC(SpeechCLConfig(**TINY))
    dataset = SpeechDataset(corpus.select(range(12)), 16000)
    labels = [[1 + (row + place) % 30 for place in range(2 + row % 3)] for row in range(12)]
    return CTCTrainer(
        model=model,
        args=CTCTrainingArguments(output_dir=str(output_dir), use_cpu=True, report_to="none", **arguments),
        references=["a b"] * 12,
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=CTCCollator(
            model._get_feat_extract_output_lengths, labels, mask_time_prob=0.3, num_feature_masks=1
        ),
        max_seconds_per_batch=8,
    )


def gradients(trainer, micro_batches, model=None):
    """The loss that the trainer reports for one update of these micro-batches, and the gradients it accumulates."""
    trainer.model.zero_grad()
    batches, counts = trainer.get_batch_samples(iter(micro_batches), len(micro_batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    loss = sum(trainer.training_step(model or trainer.model, batch, counts) for batch in batches)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def quiet_gumbel_softmax(logits, tau, hard):
    """Gumbel noise is drawn per batch and would differ; everything else that is random belongs to a clip."""
    soft = (logits / tau).softmax(-1)
    return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]) + soft - soft.detach()


def assert_equal(found, expected, what=""):
    """Losses and gradients equal to a hundred-thousandth of the largest gradient."""
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    assert largest > 1e-3
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5 * max(largest, 1), msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("kind", [*KINDS, "ctc"])
def test_gradient_of_one_batch_equals_gradient_of_unequal_micro_batches(kind, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.functional, "gumbel_softmax", quiet_gumbel_softmax)
    if kind == "ctc":
        trainer = make_ctc_trainer(corpus, tmp_path)
    else:
        trainer = make_pretraining_trainer(corpus, tmp_path, objectives_of(kind))
    items = [trainer.train_dataset[0, index] for index in range(12)]
    collate = trainer.data_collator
    whole = gradients(trainer, [collate(items)])
    parts = [collate(items[:1]), collate(items[1:9]), collate(items[9:])]
    counts = [trainer.count_items(part) for part in parts]
    assert all(len({int(count[name]) for count in counts}) == 3 for name in counts[0])
    assert_equal(gradients(trainer, parts), whole)


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


def test_cached_gradient_equals_that_of_one_batch_with_dropout(corpus, tmp_path):
    """Both encodings of a micro-batch draw the same; so the first and only micro-batch is a batch."""
    trainer = make_pretraining_trainer(corpus, tmp_path, {"info_nce": SMALL_OBJECTIVES["info_nce"]})
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    batch = trainer.data_collator([trainer.train_dataset[0, index] for index in range(6)])
    torch.manual_seed(1)
    whole = gradients(trainer, [dict(batch)])
    torch.manual_seed(1)
    trainer.num_micro_batches, trainer.micro_batch = 1, 0
    trainer._cache_gradients([dict(batch)])
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, dict(batch), {})
    assert loss == pytest.approx(whole[0].item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[1][name], rtol=1e-4, atol=1e-6)


def test_micro_batches_are_encoded_twice_with_the_same_dropout_and_precision(corpus, tmp_path, monkeypatch):
    objectives = {"info_nce": SMALL_OBJECTIVES["info_nce"]}
    trainer = make_pretraining_trainer(corpus, tmp_path, objectives, bf16=True)
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    seen = []
    embed = type(trainer.model.objectives["info_nce"]).embed

    def spy(self, *args):
        embedded = embed(self, *args)
        seen.append(embedded["embeddings"].detach().clone())
        return embedded

    monkeypatch.setattr(type(trainer.model.objectives["info_nce"]), "embed", spy)
    items = [trainer.train_dataset[0, index] for index in range(9)]
    gradients(trainer, [trainer.data_collator(items[start : start + 3]) for start in (0, 3, 6)])
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:]):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_validation_compares_the_same_clips_in_whatever_batches(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_speechcl.training.pretraining_trainer.EVALUATION_CLIPS", 5)
    trainer = make_pretraining_trainer(corpus, tmp_path, {"info_nce": SMALL_OBJECTIVES["info_nce"]})
    first = trainer.evaluate()["eval_loss"]
    trainer.max_seconds_per_batch = 30
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-5)


def test_comparing_objectives_refuse_what_they_cannot_do(corpus, tmp_path):
    objectives = {"info_nce": SMALL_OBJECTIVES["info_nce"]}
    with pytest.raises(ValueError, match="torch_compile does not work with info_nce"):
        make_pretraining_trainer(corpus, tmp_path, objectives, torch_compile=True)


def test_without_grad_cache_micro_batches_are_compared_each_for_itself(corpus, tmp_path):
    objectives = {"info_nce": SMALL_OBJECTIVES["info_nce"]}
    trainer = make_pretraining_trainer(corpus, tmp_path, objectives, grad_cache=False)
    items = [trainer.train_dataset[0, index] for index in range(12)]
    parts = [trainer.data_collator(items[:5]), trainer.data_collator(items[5:])]
    alone = [gradients(trainer, [part]) for part in map(dict, parts)]
    loss, found = gradients(trainer, parts)
    assert loss == pytest.approx(sum(loss for loss, _ in alone).item() / 2, rel=1e-5)
    expected = {name: (alone[0][1][name] + alone[1][1][name]) / 2 for name in found}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_validation_loss_is_the_same_every_time_and_does_not_depend_on_the_batches(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first == second
    trainer.max_seconds_per_batch = 30
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert set(first) >= {"eval_loss", "eval_best_rq/accuracy", "eval_best_rq/code_perplexity", "eval_wav2vec2/loss"}


def test_logged_scalars_are_those_of_all_batches_since_the_last_log(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path, {"best_rq": SMALL_OBJECTIVES["best_rq"]})
    trainer.args.max_steps, trainer.args.logging_steps, trainer.args.eval_strategy = 2, 2, "no"
    trainer.args.learning_rate = 0.0  # both batches are judged by the same weights
    sampler = trainer.get_train_dataloader()
    with torch.no_grad():
        outputs = [
            trainer.model(**{key: value for key, value in batch.items() if key != "num_skipped"})
            for batch in map(trainer._prepare_inputs, sampler)
        ]
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    sums = [output.objectives["best_rq"] for output in outputs[:2]]
    num_items = sum(output.num_items for output in sums)
    assert entry["best_rq/loss"] == pytest.approx((sum(o.loss for o in sums) / num_items).item(), rel=1e-5)
    assert entry["best_rq/accuracy"] == pytest.approx((sum(o.metrics["accuracy"] for o in sums) / num_items).item())
    assert entry["loss"] == pytest.approx(sum((o.loss / o.num_items).item() for o in sums) / 2, rel=1e-5)
    assert entry["audio_hours"] > 0
    assert set(entry) >= {"grad_norm", "learning_rate", "best_rq/code_perplexity"}


def test_training_stops_when_the_loss_is_not_finite(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    nn.init.constant_(trainer.model.speechcl.norm.weight, float("nan"))
    trainer.args.max_steps, trainer.args.logging_steps = 4, 1
    with pytest.raises(FloatingPointError, match="loss is nan at update 1: lower learning_rate"):
        trainer.train()


def test_head_and_encoder_have_their_learning_rates_and_the_encoder_waits(corpus, tmp_path):
    trainer = make_ctc_trainer(
        corpus, tmp_path, learning_rate=1e-4, head_learning_rate=1e-2, freeze_encoder_steps=3, max_steps=6,
        warmup_steps=0, eval_strategy="no", save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.args.max_steps = 3
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"lm_head.weight", "lm_head.bias"}
    encoder = [p for name, p in trainer.model.named_parameters() if name.startswith("speechcl.")]
    assert not any(parameter in trainer.optimizer.state for parameter in encoder)
    trainer.optimizer = None
    trainer.args.max_steps = 6
    trainer.train()
    rates = {group["in_encoder"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {True: 1e-4, False: 1e-2}
    assert not torch.equal(trainer.model.speechcl.norm.weight, before["speechcl.norm.weight"])


def test_a_run_that_ends_between_two_log_lines_is_checked_too(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    nn.init.constant_(trainer.model.speechcl.norm.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        trainer.evaluate()


def test_a_run_does_not_go_on_under_other_options(tmp_path):
    def keep(checkpoint, **changes):
        args = SpeechTrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=changes.pop("seed", 0))
        keep_options(args, checkpoint, PretrainingDataArguments(**changes))

    keep(None)
    keep("checkpoint-1")
    with pytest.raises(ValueError, match=r"begun with mask_prob=0.65, now 0.3: give the same"):
        keep("checkpoint-1", mask_prob=0.3)
    with pytest.raises(ValueError, match=r"seed=0, now 7"):
        keep("checkpoint-1", seed=7)
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
    assert find_checkpoint(str(tmp_path), "last") == str(tmp_path / "checkpoint-8")
    with pytest.raises(
        FileExistsError, match="holds checkpoint-8 of an earlier run: pass --resume_from_checkpoint last"
    ):
        find_checkpoint(str(tmp_path), None)
    with pytest.raises(FileNotFoundError, match="not a complete checkpoint"):
        find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-9"))


def pretraining_command(output_dir, max_steps, *more):
    return [
        "--output_dir", output_dir, "--max_steps", max_steps, "--objectives", "best_rq=1", "wav2vec2=0.5",
        "--encoder_options", *TINY_OPTIONS, "hidden_dropout=0.1", "layerdrop=0.2", *FAST_RUN,
        "--save_strategy", "steps", *more,
    ]  # fmt: skip


def test_run_killed_and_resumed_ends_with_the_weights_of_an_uninterrupted_run(tmp_path):
    steps = 55  # past the first epoch's end
    command = pretraining_command(tmp_path / "whole", steps, "--save_steps", 100)
    command[command.index("12")] = "30"
    run_script("pretrain.py", *command)

    command = pretraining_command(tmp_path / "killed", steps, "--save_steps", 25)
    command[command.index("12")] = "30"
    script = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *map(str, command)]
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while not (tmp_path / "killed" / "checkpoint-25" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()

    refused = run_script("pretrain.py", *command, check=False)
    assert refused.returncode
    assert "pass --resume_from_checkpoint last" in refused.stderr
    resumed = run_script("pretrain.py", *command, "--resume_from_checkpoint", "last")
    assert "resuming from" in resumed.stderr
    whole, again = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


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


def test_run_that_compares_clips_of_several_micro_batches_resumes_exactly(tmp_path):
    command = ["--max_steps", 6, "--objectives", "info_nce=1", "--gradient_accumulation_steps", 2]
    command += ["--encoder_options", *TINY_OPTIONS, "hidden_dropout=0.3", *FAST_RUN, "--save_strategy", "steps"]
    for run, more in {"whole": ["--save_steps", 4], "resumed": []}.items():
        if run == "resumed":
            more = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-4"]
        pretrain([str(part) for part in [*command, "--output_dir", tmp_path / run, *more]])
    whole, resumed = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "resumed"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def launch(script, *arguments):
    """Run a script on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script), *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    return result


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


def test_two_processes_equal_one_that_accumulates(tmp_path):
    common = ["--max_steps", 4, "--encoder_options", *TINY_OPTIONS, *FAST_RUN, "--optim", "sgd"]
    common += ["--objectives", "best_rq=1", "--learning_rate", "0.1"]
    run_script("pretrain.py", *common, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 2)
    launch(ROOT / "scripts" / "pretrain.py", *common, "--output_dir", tmp_path / "two")
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_compared_clips_of_two_processes_equal_those_of_one_with_accumulation_and_validation(tmp_path):
    common = [
        "--max_steps",
        2,
        "--encoder_options",
        *TINY_OPTIONS,
        *FAST_RUN,
        "--optim",
        "sgd",
        "--learning_rate",
        "0.1",
    ]
    common += ["--objectives", "info_nce=1", "siamese=1", "--eval_strategy", "steps", "--eval_steps", 1]
    common += ["--objective_options", "siamese.form=simsiam", "--view_augmentations", "gain=1"]
    run_script("pretrain.py", *common, "--output_dir", tmp_path / "one", "--gradient_accumulation_steps", 4)
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
    run_script("finetune_ctc.py", *common, "--output_dir", tmp_path / "one")
    launch(ROOT / "scripts" / "finetune_ctc.py", *common, "--output_dir", tmp_path / "two")
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert two["eval_wer"] == one["eval_wer"]
    scores = ["--model", tmp_path / "one", "--corpus", audio_folder, "--split", "train", "--device", "cpu"]
    run_script("evaluate.py", *scores, "--output_file", tmp_path / "one.json")
    launch(ROOT / "scripts" / "evaluate.py", *scores, "--output_file", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for results in (one, two):
        del results["real_time_factor"]
        for clip in results["transcripts"]:
            del clip["seconds"]
    assert one == two


class ValuesRead(TorchDispatchMode):
    """Counts the tensors whose value Python asks for, for which it would wait until a device has computed them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_the_trainer_reads_no_value_back_between_log_lines(corpus, tmp_path, monkeypatch):
    trainer = make_pretraining_trainer(
        corpus, tmp_path, {"best_rq": SMALL_OBJECTIVES["best_rq"]}, max_steps=5, logging_steps=4, eval_strategy="no",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    values, read = ValuesRead(), []
    objective_outputs = trainer.objective_outputs

    def uncounted(*args):
        before = values.count
        outputs = objective_outputs(*args)
        values.count = before
        return outputs

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            read.append(values.count)

    monkeypatch.setattr(trainer, "objective_outputs", uncounted)
    trainer.add_callback(Watch())
    with values:
        trainer.train()
    assert read[0] == read[3]  # the fourth ends before its line is written
    assert read[4] > read[3]


def test_samples_of_16_bits_give_the_inputs_that_float32_gives(audio_folder, tmp_path):
    trainer = make_pretraining_trainer(load_corpus("demo", "validation"), tmp_path)
    corpus = load_corpus(str(audio_folder))
    clips, floats = (
        [SpeechDataset(corpus, 16000, in_16_bits=in_16_bits)[0, index] for index in range(4)]
        for in_16_bits in (True, False)
    )
    assert all(clip["input_values"].dtype == np.int16 for clip in clips)
    for options in ({"corrupt_input": True}, {"corrupt_input": False, "num_views": 2}):
        collate = replace(trainer.data_collator, view_augmentation=quieter, **options)
        batch = collate(clips)
        assert batch["input_values"].dtype == (torch.float32 if options["corrupt_input"] else torch.int16)
        assert batch["attention_mask"].dtype == torch.bool
        torch.testing.assert_close(
            trainer._prepare_inputs(batch), trainer._prepare_inputs(collate(floats)), rtol=0, atol=0
        )
    for clip, row in zip(clips, corpus):
        assert (to_float32(clip["input_values"]) == read_audio(row["audio"], 16000)).all()


def test_samples_beyond_full_scale_are_cut_off_and_those_of_another_scale_refused():
    assert to_int16(np.float32([0, 0.5, 1.1, -1.1, 2**-15])).tolist() == [0, 16384, 32767, -32768, 1]
    with pytest.raises(AudioError, match="samples of up to 2e.04, expected -1 to 1"):
        to_int16(np.float32([0, -20000]))


def test_clips_are_decoded_once_as_far_as_there_is_room(corpus, monkeypatch):
    dataset = SpeechDataset(corpus.select(range(4)), 16000)
    fresh = [dataset[0, index]["input_values"] for index in range(4)]
    dataset.keep_decoded(fresh[0].nbytes + fresh[1].nbytes)
    assert all((dataset[0, index]["input_values"] == clip).all() for index, clip in enumerate(fresh))
    decoded = []
    monkeypatch.setattr("hf_speechcl.data.dataset.read_audio", lambda *args: decoded.append(args) or read_audio(*args))
    assert all((dataset[1, index]["input_values"] == clip).all() for index, clip in enumerate(fresh))
    assert len(decoded) == 2
    assert dataset[1, 0]["seed"] == (0, 1, 0)


def test_batches_are_the_same_whoever_makes_them(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    expected = list(trainer.get_train_dataloader())
    made_by_thread = list(ahead(trainer.get_train_dataloader()))
    trainer.args.dataloader_num_workers = 1
    made_by_process = list(trainer.get_train_dataloader())
    assert len(expected) > 2
    torch.testing.assert_close(made_by_thread, expected, rtol=0, atol=0)
    torch.testing.assert_close(made_by_process, expected, rtol=0, atol=0)


def test_items_are_made_ahead_in_order_and_an_error_comes_in_its_place():
    made = []

    def make():
        for number in range(6):
            made.append(number)
            yield number
        raise ValueError("the seventh")

    items = ahead(make(), depth=2)
    for number in range(6):
        assert next(items) == number
        assert len(made) <= number + 4
    with pytest.raises(ValueError, match="the seventh"):
        next(items)
    assert list(ahead([])) == []


def test_benchmark_of_the_data_path_prints_its_tables():
    output = run_script(
        "benchmarks/data_path.py", "--encoder_options", *TINY_OPTIONS, "--threads", 1, "--updates", 3, "--rounds", 1,
        "--max_seconds_per_batch", 8, "--decoded_seconds", 5, "--command", "False",
    ).stdout  # fmt: skip
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:1] == "|"]
    shares = {row[0]: float(row[3].split()[0]) for row in rows if len(row) == 4 and row[1][:1].isdigit()}
    assert shares.pop("bare loop, batches in memory") == 1
    assert len(shares) == 7
    assert all(share > 0 for share in shares.values())
    assert {"decoding, with the rows", "the corpus"} <= {row[0] for row in rows}
    assert "float32, cpu, 8 s a batch" in output.splitlines()[0]


def test_evaluation_draws_nothing_from_the_generator_of_training(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    before = torch.get_rng_state()
    trainer.evaluate()
    next(iter(trainer.get_train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)
