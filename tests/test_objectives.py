"""Quantisers and objectives against plain-loop references and against transformers."""

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining, Wav2Vec2Model

from hf_speechcl import OBJECTIVES, Objective, ObjectiveOutput, SpeechCLConfig, SpeechCLForPreTraining
from hf_speechcl.data.collators import PretrainingCollator
from hf_speechcl.objectives.best_rq import BestRQ, masked_prediction_loss, stack_frames
from hf_speechcl.objectives.wav2vec2 import Wav2Vec2Contrastive, contrastive_logits, diversity_loss
from hf_speechcl.pretraining import build_objective
from hf_speechcl.quantizers import GumbelVectorQuantizer, RandomProjectionQuantizer, code_histogram, perplexity
from tests import reference
from tests.conftest import SMALL_OBJECTIVES, TINY, units_of


def make_batch(model, clips, num_negatives=7):
    collator = PretrainingCollator(model._get_feat_extract_output_lengths, num_negatives=num_negatives, units=units_of)
    batch = collator(
        [{"index": number, "input_values": clip, "seed": (0, 0, number)} for number, clip in enumerate(clips)]
    )
    batch.pop("num_skipped")
    return batch


def test_best_rq_codes_equal_reference():
    quantizer = RandomProjectionQuantizer(12, 4, 9, num_codebooks=3, seed=5)
    quantizer.init_weights()
    frames = torch.randn(20, 12)
    assert quantizer(frames).tolist() == reference.best_rq_codes(frames, quantizer.projection, quantizer.codebook)


def test_best_rq_quantizer_depends_on_its_seed_alone():
    first, second, third = (RandomProjectionQuantizer(12, 4, 9, 2, seed=seed) for seed in (1, 1, 2))
    for number, quantizer in enumerate((first, second, third)):
        torch.manual_seed(number)
        quantizer.init_weights()
    torch.testing.assert_close(first.projection, second.projection, rtol=0, atol=0)
    assert not torch.equal(first.codebook, third.codebook)


@pytest.mark.parametrize("frames", [1, 13])
def test_masked_prediction_loss_equals_reference(frames):
    logits, codes = torch.randn(frames, 3, 11), torch.randint(11, (frames, 3))
    assert masked_prediction_loss(logits, codes).item() == pytest.approx(
        reference.masked_prediction_loss(logits, codes), rel=1e-5
    )


def test_masked_prediction_loss_of_no_frames_is_zero_and_has_gradients():
    logits = torch.randn(0, 3, 11, requires_grad=True)
    loss = masked_prediction_loss(logits, torch.zeros(0, 3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("same_codes", [False, True])
def test_contrastive_loss_equals_reference(same_codes):
    predictions, targets = torch.randn(9, 6), torch.randn(9, 6)
    codes = torch.zeros(9, 2, dtype=torch.long) if same_codes else torch.randint(3, (9, 2))
    negatives = torch.randint(9, (9, 5))
    logits = contrastive_logits(predictions, targets, codes, negatives, temperature=0.1)
    loss = -logits.log_softmax(-1)[:, 0].sum()
    expected = reference.contrastive_loss(predictions, targets, codes, negatives, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if same_codes:
        assert loss.item() == 0


def test_diversity_loss_equals_reference():
    probabilities = torch.randn(12, 2, 5).softmax(-1)
    clips = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 3])
    loss = diversity_loss(probabilities, clips, num_clips=4)
    assert loss.item() == pytest.approx(reference.diversity_loss(probabilities, clips), rel=1e-5)


def test_diversity_loss_is_zero_for_even_use_and_largest_for_one_code():
    even = torch.full((4, 2, 8), 1 / 8)
    one = nn.functional.one_hot(torch.zeros(4, 2, dtype=torch.long), 8).float()
    clips = torch.zeros(4, dtype=torch.long)
    assert diversity_loss(even, clips, 1).item() == pytest.approx(0, abs=1e-4)
    assert diversity_loss(one, clips, 1).item() == pytest.approx(4 * (16 - 2) / 16, rel=1e-4)


def test_gumbel_quantizer_picks_the_likeliest_code_in_evaluation():
    quantizer = GumbelVectorQuantizer(6, 8, 5, num_codebooks=2)
    quantizer.init_weights()
    frames = torch.randn(7, 6)
    codevectors, probabilities, codes = quantizer.eval()(frames, temperature=1.0)
    assert torch.equal(codes, probabilities.argmax(-1))
    for vector, row in zip(codevectors, codes):
        torch.testing.assert_close(
            vector, torch.cat([quantizer.codevectors[group, code] for group, code in enumerate(row)])
        )


def test_gumbel_quantizer_passes_gradients_to_its_input_and_samples_in_training():
    quantizer = GumbelVectorQuantizer(6, 8, 5, num_codebooks=2)
    quantizer.init_weights()
    frames = torch.randn(50, 6, requires_grad=True)
    codevectors, _, codes = quantizer.train()(frames, temperature=2.0)
    codevectors.square().sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()
    assert not torch.equal(codes, quantizer(frames, temperature=2.0)[2])


def test_perplexity_counts_codes_in_use():
    codes = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
    histogram = code_histogram(codes, 6)
    assert histogram.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 4, 0, 0]]
    torch.testing.assert_close(perplexity(histogram), torch.tensor([4.0, 1.0]))


def test_target_frames_are_normalized_over_the_clip_alone():
    log_mel = torch.randn(2, 22, 3) * 5 + 2
    lengths = torch.tensor([22, 13])
    stacked = stack_frames(log_mel, num_frames=6, lengths=lengths)
    assert stacked.shape == (2, 6, 12)
    own = stacked[1].reshape(-1, 3)[:13]
    torch.testing.assert_close(own.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(own.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-4)
    assert (stacked[1].reshape(-1, 3)[13:] == 0).all()
    torch.testing.assert_close(stacked[1, :3], stack_frames(log_mel[1:, :13], 4, lengths[1:])[0, :3])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_item_count_is_the_number_of_masked_frames(name, pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config).eval()
    batch = make_batch(model, clips)
    output = model(**batch).objectives[name]
    assert output.num_items == batch["mask_time_indices"].sum() == model.count_items(batch)[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_ignores_unmasked_frames_and_is_finite_with_nothing_masked(name, pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config)
    batch = make_batch(model, clips)
    batch["mask_time_indices"] = torch.zeros_like(batch["mask_time_indices"])
    batch["negative_indices"] = batch["negative_indices"][:0]
    output = model(**batch)
    assert output.loss == 0
    output.loss.backward()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_under_bfloat16_autocast_is_close_to_float32(name, pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config).eval()
    batch = make_batch(model, clips)
    expected = model(**batch).objectives[name].loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch).objectives[name].loss
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.03, atol=0)


def test_objectives_share_one_encoder_pass(pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config)
    calls = []
    model.speechcl.register_forward_hook(lambda *args: calls.append(1))
    outputs = model(**make_batch(model, clips)).objectives
    assert set(outputs) == set(SMALL_OBJECTIVES)
    assert len(calls) == 1


def test_loss_is_the_weighted_sum_of_means(pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config).eval()
    output = model(**make_batch(model, clips))
    means = {name: part.loss / part.num_items for name, part in output.objectives.items()}
    expected = means["best_rq"] + 0.5 * means["wav2vec2"] + 0.7 * means["hubert"]
    torch.testing.assert_close(output.loss, expected)


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


def without_noise(logits, tau, hard):
    """A Gumbel softmax that draws nothing."""
    return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)


def test_wav2vec2_loss_equals_that_of_transformers(wav2vec2_config, clips, monkeypatch):
    monkeypatch.setattr(nn.functional, "gumbel_softmax", without_noise)
    theirs = Wav2Vec2ForPreTraining(wav2vec2_config).train()
    ours = Wav2Vec2Contrastive(wav2vec2_config, num_negatives=6, codebook_size=10, codevector_dim=16, proj_dim=12)
    ours.quantizer.codevectors.data = theirs.quantizer.codevectors.data.view(2, 10, 8).clone()
    ours.quantizer.weight_proj.load_state_dict(theirs.quantizer.weight_proj.state_dict())
    ours.project_target.load_state_dict(theirs.project_q.state_dict())
    ours.project_prediction.load_state_dict(theirs.project_hid.state_dict())

    batch = make_batch(theirs, clips[2:3], num_negatives=6)
    mask = batch["mask_time_indices"]
    # transformers counts negatives among all frames of the batch; ours among the masked ones.
    frames = mask.flatten().nonzero()[:, 0]
    negatives = torch.zeros(*mask.shape, 6, dtype=torch.long)
    negatives[mask] = frames[batch["negative_indices"]]
    expected = theirs(batch["input_values"], mask_time_indices=mask, sampled_negative_indices=negatives)
    output = ours(theirs.wav2vec2, batch)
    torch.testing.assert_close(output.metrics["contrastive_loss"], expected.contrastive_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_work_on_a_wav2vec2_encoder(name, wav2vec2_config, clips):
    encoder = Wav2Vec2Model(wav2vec2_config)
    options = {"samples_per_unit": 320} if name == "hubert" else {}
    objective = build_objective(name, wav2vec2_config, SMALL_OBJECTIVES[name] | options)
    for module in objective.modules():
        if hasattr(module, "init_weights"):
            module.init_weights()
    output = objective(encoder, make_batch(encoder, clips))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.num_items > 0


def test_gumbel_temperature_falls_geometrically_to_its_end(config):
    objective = Wav2Vec2Contrastive(config)
    temperatures = []
    for progress in (0.0, 0.35, 0.7, 1.0):
        objective.set_progress(progress)
        temperatures.append(objective.gumbel_temperature)
    assert temperatures == pytest.approx([2.0, 1.0, 0.5, 0.5])


def test_default_quantizer_of_best_rq_takes_the_encoder_rate():
    for factor in (2, 4, 8):
        objective = BestRQ(SpeechCLConfig(**TINY, subsampling_factor=factor))
        assert objective.quantizer.projection.shape[1] == factor * 80


def test_best_rq_refuses_an_encoder_rate_that_its_frames_do_not_divide():
    with pytest.raises(ValueError, match="multiple of it, found 512 samples"):
        BestRQ(SpeechCLConfig(**TINY, hop_length=128))


def test_adding_an_objective_takes_a_class_and_a_line(monkeypatch, clips):
    class EnergyRegression(Objective):
        masked_frames = True

        def __init__(self, config, scale: float = 1.0):
            super().__init__()
            self.scale, self.head = scale, nn.Linear(config.hidden_size, 1)

        def count_items(self, batch):
            return batch["mask_time_indices"].sum()

        def forward(self, encoder, batch):
            mask = batch["mask_time_indices"]
            states = encoder(
                batch["input_values"], attention_mask=batch.get("attention_mask"), mask_time_indices=mask
            ).last_hidden_state
            return ObjectiveOutput((self.scale * self.head(states[mask])).square().sum(), mask.sum(), {})

    monkeypatch.setitem(OBJECTIVES, "energy", EnergyRegression)
    objectives = {"energy": {"weight": 2.0, "scale": 0.1}, "best_rq": {"codebook_size": 16}}
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))
    output = model(**make_batch(model, clips))
    output.loss.backward()
    assert model.objectives["energy"].scale == 0.1
    assert model.objectives["energy"].head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"bestrq": {}}, "unknown objective 'bestrq': expected one of best_rq, wav2vec2"),
        ({"best_rq": {"codebooks": 2}}, "'best_rq' has no option codebooks: it takes num_codebooks"),
        ({"best_rq": {"num_codebooks": 1.5}}, "best_rq.num_codebooks must be like its default 4, found 1.5"),
        ({"best_rq": {"codebook_size": 0}}, "best_rq.codebook_size must be positive, found 0"),
        ({"wav2vec2": {"temperature": -1}}, "wav2vec2.temperature must be positive"),
        ({"wav2vec2": {"num_negatives": "many"}}, "wav2vec2.num_negatives must be like its default 100, found 'many'"),
        ({}, "objectives is empty"),
    ],
)
def test_unknown_objective_or_option_is_refused_by_name(objectives, message):
    with pytest.raises(ValueError, match=message):
        SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))
