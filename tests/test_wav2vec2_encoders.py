"""Objectives on an encoder of transformers, and parity with its wav2vec 2.0."""

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model
from transformers.modeling_outputs import BaseModelOutput

from hf_speechcl import OBJECTIVES
from hf_speechcl.objectives.wav2vec2 import Wav2Vec2Contrastive
from hf_speechcl.pretraining import build_objective
from tests.conftest import SMALL_OBJECTIVES, make_batch


@pytest.fixture(scope="module")
def wav2vec2_config():
    return Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        codevector_dim=16,
        proj_codevector_dim=12,
        num_codevectors_per_group=10,
        num_negatives=6,
        mask_time_prob=0.05,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
    )


def make_plain_batch(encoder, clips, objective):
    """A batch for one objective on an encoder of another kind."""
    encoder.collator_options = objective.collator_options
    return make_batch(encoder, clips)


def without_noise(logits, tau, hard):
    """A Gumbel softmax that draws nothing."""
    return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


def test_wav2vec2_loss_equals_that_of_transformers(wav2vec2_config, clips, monkeypatch):
    monkeypatch.setattr(nn.functional, "gumbel_softmax", without_noise)
    theirs = Wav2Vec2ForPreTraining(wav2vec2_config).train()
    ours = Wav2Vec2Contrastive(
        wav2vec2_config, num_negatives=6, codebook_size=10, codevector_dim=16, proj_dim=12, diversity_weight=0.1
    )
    ours.quantizer.codevectors.data = theirs.quantizer.codevectors.data.view(2, 10, 8).clone()
    ours.quantizer.weight_proj.load_state_dict(theirs.quantizer.weight_proj.state_dict())
    ours.project_target.load_state_dict(theirs.project_q.state_dict())
    ours.project_prediction.load_state_dict(theirs.project_hid.state_dict())

    batch = make_plain_batch(theirs, clips[2:3], ours)
    mask = batch["mask_time_indices"]
    # transformers counts negatives among all frames of the batch; ours among the masked ones.
    frames = mask.flatten().nonzero()[:, 0]
    negatives = torch.zeros(*mask.shape, 6, dtype=torch.long)
    negatives[mask] = frames[batch["negative_indices"]]
    expected = theirs(batch["input_values"], mask_time_indices=mask, sampled_negative_indices=negatives)
    output = ours(theirs.wav2vec2, batch)
    torch.testing.assert_close(output.metrics["contrastive_loss"], expected.contrastive_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "cpc"])
def test_objectives_work_on_a_wav2vec2_encoder(name, wav2vec2_config, clips):
    encoder = Wav2Vec2Model(wav2vec2_config)
    options = {"samples_per_unit": 320} if name == "hubert" else {}
    objective = build_objective(name, wav2vec2_config, SMALL_OBJECTIVES[name] | options)
    for module in objective.modules():
        if hasattr(module, "init_weights") and not isinstance(module, Wav2Vec2Model):
            module.init_weights()
    batch = make_plain_batch(encoder, clips, objective)
    for key in ("mask_feature_indices", "log_mel_noise"):
        batch.pop(key, None)
    output = objective(encoder, batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.num_items > 0


@pytest.mark.parametrize("name", ["best_rq", "denoising", "masked_reconstruction"])
def test_log_mel_targets_of_a_wav2vec2_encoder_do_not_depend_on_padding(name, wav2vec2_config, clips):
    encoder = Wav2Vec2Model(wav2vec2_config).eval()
    objective = build_objective(name, wav2vec2_config, SMALL_OBJECTIVES[name])
    targets, frames = [], []
    for batch in (make_plain_batch(encoder, clips[:1], objective), make_plain_batch(encoder, clips, objective)):
        outputs = encoder(batch["input_values"], attention_mask=batch.get("attention_mask"))
        targets.append(objective.targets(batch, outputs)[0])
        frames.append(int(batch["frame_counts"][0]))
    assert frames[0] == frames[1]
    torch.testing.assert_close(targets[0][: frames[0]], targets[1][: frames[0]], rtol=1e-4, atol=1e-4)


def test_cpc_refuses_an_encoder_that_cannot_be_causal(wav2vec2_config, clips):
    encoder = Wav2Vec2Model(wav2vec2_config)
    objective = build_objective("cpc", wav2vec2_config, {})
    with pytest.raises(TypeError, match="cpc needs an encoder that can be run causally, .* found Wav2Vec2Model"):
        objective(encoder, make_plain_batch(encoder, clips, objective))


def test_wav2vec2_refuses_an_encoder_that_gives_no_features(wav2vec2_config, clips):
    objective = build_objective("wav2vec2", wav2vec2_config, {})
    batch = make_plain_batch(Wav2Vec2Model(wav2vec2_config), clips, objective)
    with pytest.raises(TypeError, match="wav2vec2 needs an encoder that gives extract_features"):
        objective(lambda *_, **__: BaseModelOutput(last_hidden_state=torch.zeros(1, 1, 1)), batch)
