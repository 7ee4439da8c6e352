"""The trainer's arithmetic: gradients, losses, what is logged."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_speechcl.training.pretraining_trainer import validation_groups
from tests.conftest import SMALL_OBJECTIVES
from tests.trainers import (
    KINDS,
    assert_equal,
    gradients,
    make_ctc_trainer,
    make_pretraining_trainer,
    objectives_of,
    quiet_gumbel_softmax,
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


def test_validation_compares_clips_that_have_others_of_their_label(monkeypatch):
    monkeypatch.setattr("hf_speechcl.training.pretraining_trainer.EVALUATION_CLIPS", 10)
    keys = np.random.default_rng(0).permutation(100).tolist()
    assert sum(validation_groups(list(range(100)), keys, 1), []) == np.argsort(keys).tolist()
    labels = [0, 1, 0, 1, *range(2, 98)]
    first, *others = validation_groups(labels, keys, 2)
    assert {0, 1, 2, 3} <= set(first)
    assert sorted(sum(others, first)) == list(range(100))
    assert {len(group) for group in (first, *others)} == {10}
    monkeypatch.setattr("hf_speechcl.training.pretraining_trainer.EVALUATION_CLIPS", 30)
    of_two = validation_groups([place % 2 for place in range(100)], keys, 3)
    assert all({place % 2 for place in group} == {0, 1} for group in of_two)


def test_comparing_objectives_refuse_what_they_cannot_do(corpus, tmp_path):
    objectives = {"info_nce": SMALL_OBJECTIVES["info_nce"]}
    with pytest.raises(ValueError, match="torch_compile does not work with info_nce"):
        make_pretraining_trainer(corpus, tmp_path, objectives, torch_compile=True)
    one_voice, every_voice = (
        corpus.select(range(12)).add_column("label", voices) for voices in (["a"] * 12, list("abcdefghijkl"))
    )
    with pytest.raises(ValueError, match="info_nce compares clips by their labels, and of those of validation 1 has 1"):
        make_pretraining_trainer(one_voice, tmp_path, objectives)
    make_pretraining_trainer(every_voice, tmp_path, objectives)
    make_pretraining_trainer(one_voice, tmp_path, {"siamese": {"form": "simsiam"}})  # compares no labels
    with pytest.raises(ValueError, match="of those of validation 0 has 3 clips or more, where two are needed"):
        make_pretraining_trainer(every_voice, tmp_path, {"prototypical": {"k_shot": 2, "num_views": 1}})


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


def test_a_training_line_after_a_validation_is_of_the_training(corpus, tmp_path):
    trainer = make_pretraining_trainer(
        corpus, tmp_path, {"info_nce": SMALL_OBJECTIVES["info_nce"]}, max_steps=2, logging_strategy="epoch",
        eval_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer.train()
    *_, validation, training = (entry for entry in trainer.state.log_history if "train_runtime" not in entry)
    assert training["info_nce/loss"] > 0
    assert validation["eval_loss"] > 0
    assert not any(name.startswith("eval") for name in training)


def test_a_batch_whose_clips_are_all_skipped_teaches_a_recogniser_nothing(corpus, tmp_path):
    trainer = make_ctc_trainer(corpus, tmp_path)
    items = [trainer.train_dataset[0, index] for index in range(3)]
    skipped = trainer.data_collator([items[0] | {"input_values": None}])
    loss, found = gradients(trainer, [dict(skipped)])
    assert loss == 0
    assert all((gradient == 0).all() for gradient in found.values())
    whole = gradients(trainer, [trainer.data_collator(items)])
    assert_equal(gradients(trainer, [trainer.data_collator(items), skipped]), whole)


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


def test_evaluation_draws_nothing_from_the_generator_of_training(corpus, tmp_path):
    trainer = make_pretraining_trainer(corpus, tmp_path)
    before = torch.get_rng_state()
    trainer.evaluate()
    next(iter(trainer.get_train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)
