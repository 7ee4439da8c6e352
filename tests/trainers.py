"""Trainers of very small models, and the gradients of one update."""

import torch
from torch import nn

from hf_speechcl import SpeechCLConfig, SpeechCLForCTC, SpeechCLForPreTraining, SpeechDataset
from hf_speechcl.data import CTCCollator
from hf_speechcl.training.arguments import SpeechTrainingArguments
from hf_speechcl.training.ctc_trainer import CTCTrainer, CTCTrainingArguments
from hf_speechcl.training.pretraining_trainer import PretrainingTrainer
from tests.conftest import SMALL_OBJECTIVES, TINY, make_collator

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
