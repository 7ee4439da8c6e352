"""Invariants of the encoder and its heads."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, TrainingArguments

from hf_speechcl import (
    SpeechCLConfig,
    SpeechCLForCTC,
    SpeechCLForPreTraining,
    SpeechCLForSequenceClassification,
    SpeechCLModel,
)
from hf_speechcl.data.collators import pad_waveforms
from hf_speechcl.modeling_speechcl import SpeechCLDropout, attend
from tests import reference
from tests.conftest import SMALL_OBJECTIVES, TINY, make_batch, make_collator

CLASSES = [SpeechCLModel, SpeechCLForCTC, SpeechCLForSequenceClassification, SpeechCLForPreTraining]


def frame_outputs(model, clips, seeds):
    """What a model says of each clip of a batch, without padding: lists of tensors."""
    if isinstance(model, SpeechCLForPreTraining):
        items = [
            {"index": seed[-1], "label": seed[-1], "input_values": clip, "seed": seed}
            for clip, seed in zip(clips, seeds)
        ]
        batch = make_collator(model)(items)
        batch.pop("num_skipped")
        outputs = model(**batch, compare=False)
        embeddings = [embedded["embeddings"].sum(0) for embedded in outputs.embedded.values()]
        return embeddings + [
            torch.stack([output.loss, output.num_items.float()]) for output in outputs.objectives.values()
        ]
    batch = pad_waveforms(clips)
    outputs = model(**batch)
    if isinstance(model, SpeechCLForSequenceClassification):
        return list(outputs.logits)
    lengths = [model._get_feat_extract_output_lengths(len(clip)) for clip in clips]
    rows = outputs.logits if isinstance(model, SpeechCLForCTC) else outputs.last_hidden_state
    return [row[:length] for row, length in zip(rows, lengths)]


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("subsampling_factor", [2, 4, 8])
@pytest.mark.parametrize(("sliding_window", "kernel_size"), [(None, None), (6, None), (None, 5), (6, 5)])
def test_clip_alone_equals_clip_in_padded_batch(model_class, subsampling_factor, sliding_window, kernel_size, clips):
    hubert = SMALL_OBJECTIVES["hubert"] | {"samples_per_unit": 160 * subsampling_factor}
    config = SpeechCLConfig(
        **TINY,
        objectives=SMALL_OBJECTIVES | {"hubert": hubert},
        subsampling_factor=subsampling_factor,
        sliding_window=sliding_window,
        conv_depthwise_kernel_size=kernel_size,
    )
    model = model_class(config).eval()
    seeds = [(0, 0, number) for number in range(len(clips))]
    together = frame_outputs(model, clips, seeds)
    alone = [frame_outputs(model, [clip], [seed]) for clip, seed in zip(clips, seeds)]
    if model_class is SpeechCLForPreTraining:  # sums over the batch
        alone = [sum(parts) for parts in zip(*alone)]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(together, [outputs[0] for outputs in alone], rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize("sliding_window", [None, 6])
def test_eager_attention_equals_sdpa(model_class, sliding_window, pretraining_config, clips):
    pretraining_config.sliding_window = sliding_window
    model = model_class(pretraining_config).eval()
    seeds = [(0, 0, number) for number in range(len(clips))]
    outputs = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.config._attn_implementation == attention
        outputs[attention] = frame_outputs(model, clips, seeds)
    torch.testing.assert_close(outputs["eager"], outputs["sdpa"], rtol=1e-5, atol=1e-5)


def test_flex_attention_equals_sdpa(config, clips):
    model = SpeechCLModel(config).eval()
    outputs = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad():  # flex attention has no backward pass on CPUs
            outputs[attention] = model(pad_waveforms(clips[:1])["input_values"]).last_hidden_state
    torch.testing.assert_close(outputs["flex_attention"], outputs["sdpa"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subsampling_factor", [2, 4, 8])
@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 639, 640, 641, 16000, 16001])
def test_frame_count_is_samples_over_ratio_rounded_up(config, subsampling_factor, num_samples):
    config.subsampling_factor = subsampling_factor
    model = SpeechCLModel(config).eval()
    frames = model(torch.randn(1, num_samples)).last_hidden_state.shape[1]
    assert frames == -(-num_samples // config.inputs_to_logits_ratio)
    assert frames == model._get_feat_extract_output_lengths(num_samples)


def test_unpadded_batch_equals_mask_of_ones(config, clips):
    model = SpeechCLModel(config).eval()
    values = torch.from_numpy(clips[0])[None]
    torch.testing.assert_close(
        model(values).last_hidden_state, model(values, attention_mask=torch.ones_like(values).long()).last_hidden_state
    )


def test_no_attention_mask_reaches_the_layers_when_nothing_is_padded(config, clips):
    model = SpeechCLModel(config).eval()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(torch.from_numpy(clips[0])[None])
    assert seen == [None]


def test_mask_replaces_exactly_the_masked_frames_before_the_layers(config, clips):
    model = SpeechCLModel(config).eval()
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    values = torch.from_numpy(clips[1])[None]
    mask = torch.zeros(1, model._get_feat_extract_output_lengths(values.shape[1]), dtype=torch.bool)
    mask[0, 2:5] = True
    plain, masked = model(values), model(values, mask_time_indices=mask)
    torch.testing.assert_close(seen[1][mask], model.masked_spec_embed.expand(3, -1))
    torch.testing.assert_close(seen[1][~mask], seen[0][~mask])
    torch.testing.assert_close(plain.extract_features, masked.extract_features)


def test_log_mel_of_a_cut_recording_equals_that_of_the_whole(config, clips):
    log_mel = SpeechCLModel(config).log_mel
    whole = torch.from_numpy(clips[3])[None]
    cut = 40 * config.hop_length
    frames = torch.cat((log_mel(whole[:, :cut]), log_mel(whole[:, cut:])), dim=1)
    inner = torch.ones(frames.shape[1], dtype=torch.bool)
    inner[39:41] = False  # the two frames whose windows cross the cut
    torch.testing.assert_close(frames[:, inner], log_mel(whole)[:, inner])


def test_samples_of_16_bits_are_refused_with_the_remedy(config):
    with pytest.raises(ValueError, match="found torch.int16: divide 16-bit samples by 32768"):
        SpeechCLModel(config)(torch.ones(1, 1600, dtype=torch.int16))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    states = torch.ones(400, 1001, requires_grad=True)
    dropped = SpeechCLDropout(p)(states)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    # Four standard deviations of a share of 400,400 draws.
    assert abs((dropped == 0).float().mean() - p) < 4 * (p * (1 - p) / states.numel()) ** 0.5
    dropped.sum().backward()
    torch.testing.assert_close(states.grad, dropped.detach())


def test_dropout_draws_anew_and_from_the_generator_of_torch():
    states, layer = torch.ones(64, 63), SpeechCLDropout(0.3)
    torch.manual_seed(1)
    first, second = layer(states), layer(states)
    torch.manual_seed(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, layer(states))
    assert layer.eval()(states) is states


def test_gradient_checkpointing_draws_the_same_dropout_twice(clips):
    config = SpeechCLConfig(**{**TINY, "hidden_dropout": 0.2, "attention_dropout": 0.2}, sliding_window=6)
    model, values = SpeechCLModel(config).train(), torch.from_numpy(clips[1])[None]
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(values).last_hidden_state.square().sum().backward()
        gradients.append(model.layers[0].attention.q_proj.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("num_frames", [1, 5, 6, 7, 12, 40])
def test_local_attention_equals_full_attention_under_a_mask(num_frames):
    config = SpeechCLConfig(**TINY, sliding_window=6)
    model, values = SpeechCLModel(config).eval(), 0.1 * torch.randn(2, num_frames * 640)
    outputs = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        outputs.append(model(values).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_of_a_frame_with_nothing_to_attend_to_is_finite(dtype):
    states = torch.full((1, 1, 4, 8), 2.0, dtype=dtype)
    for sign in (1, -1):
        output, _ = attend(states, sign * states, states, torch.zeros(4, 4, dtype=torch.bool), 1.0, 0.0, False)
        torch.testing.assert_close(output, states)


@pytest.mark.parametrize("kernel_size", [None, 5])
def test_window_and_convolution_bound_what_a_frame_sees(kernel_size, clips):
    config = SpeechCLConfig(**TINY, sliding_window=3, conv_depthwise_kernel_size=kernel_size)
    model = SpeechCLModel(config).eval()
    values = torch.from_numpy(clips[4])[None, : 640 * 40]
    changed = values.clone()
    changed[:, : 640 * 10] = torch.randn(640 * 10) * 0.1
    before, after = model(values).last_hidden_state[0], model(changed).last_hidden_state[0]
    reach = config.layer_reach + 1  # and a frame of the subsampling
    torch.testing.assert_close(after[10 + reach :], before[10 + reach :])
    assert not torch.allclose(after[10 + reach - 3], before[10 + reach - 3])


def test_constants_stay_float32_when_the_weights_do_not(config, clips):
    model, values = SpeechCLModel(config), torch.from_numpy(clips[0])[None]
    expected = model.log_mel(values)
    torch.testing.assert_close(model.to(torch.bfloat16).log_mel(values), expected, rtol=0, atol=0)


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_log_mel_equals_the_fourier_transform_in_double_precision(config, clips, offset):
    values = torch.from_numpy(clips[0])[None] + offset
    expected = reference.log_mel(values[0].double(), config)
    torch.testing.assert_close(SpeechCLModel(config).log_mel(values)[0].double(), expected, rtol=0, atol=1e-3)


def test_log_mel_peaks_at_the_bin_of_a_tone(config):
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000)[None]
    peak = SpeechCLModel(config).log_mel(tone)[0, 50].argmax().item()
    weights = reference.mel_filters(config)[:, peak]
    centre = (weights * torch.linspace(0, 8000, len(weights))).sum() / weights.sum()
    assert abs(centre - 1000) < 60


@pytest.mark.parametrize("signal", ["silence", "constant", "full_scale"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_loss_and_gradients_are_finite_on_odd_signals(model_class, signal, pretraining_config):
    values = {
        "silence": np.zeros(16000),
        "constant": np.full(16000, 0.5),
        "full_scale": np.sign(np.sin(np.arange(16000))),
    }
    clip = values[signal].astype(np.float32)
    model = model_class(pretraining_config).train()
    if model_class is SpeechCLForPreTraining:
        batch = make_batch(model, [clip, clip])
        loss = model(**batch).loss
    elif model_class is SpeechCLModel:
        loss = model(torch.from_numpy(clip)[None]).last_hidden_state.square().mean()
    else:
        labels = torch.tensor([[1, 2, 3]]) if model_class is SpeechCLForCTC else torch.tensor([1])
        loss = model(torch.from_numpy(clip)[None], labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.isfinite(norm)
    assert norm < 1e4


def test_bfloat16_weights_give_nearly_the_same_output(config, clips):
    model = SpeechCLForCTC(config).eval()
    batch = pad_waveforms(clips[:3])
    expected = model(**batch).logits
    logits = model.to(torch.bfloat16)(**batch).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


def test_ctc_output_is_blank_on_padding(config, clips):
    model = SpeechCLForCTC(config).eval()
    logits = model(**pad_waveforms(clips[:3])).logits
    for row, clip in zip(logits, clips):
        padding = row[model._get_feat_extract_output_lengths(len(clip)) :]
        assert (padding.argmax(-1) == config.pad_token_id).all()


def test_ctc_loss_is_the_sum_over_clips(config, clips):
    model = SpeechCLForCTC(config).eval()
    labels = torch.tensor([[3, 4, 5, -100], [6, 6, -100, -100], [7, 8, 9, 10]])
    together = model(**pad_waveforms(clips[1:4]), labels=labels).loss
    alone = sum(
        model(torch.from_numpy(clip)[None], labels=row[None][row[None] >= 0][None]).loss
        for clip, row in zip(clips[1:4], labels)
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(config, clips):
    model = SpeechCLModel(config).train()
    batch = pad_waveforms(clips[:2])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_reentrant_checkpoints_reach_adapters_below_which_nothing_is_trained(config):
    model = SpeechCLForCTC(config).requires_grad_(False).train()
    model.speechcl.layers[0].attention.q_proj.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(torch.randn(1, 8000), labels=torch.tensor([[1, 2]])).loss.backward()
    assert model.speechcl.layers[0].attention.q_proj.weight.grad.any()


def test_frozen_layers_below_trained_ones_are_not_gone_through_backward(config):
    model = SpeechCLModel(config).requires_grad_(False).train()
    model.layers[-1].requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].requires_grad))
    model(torch.randn(1, 8000)).last_hidden_state.sum().backward()
    assert inputs[: len(model.layers)] == [False] * len(model.layers)


def test_every_weight_takes_part_in_training_as_distributed_training_needs(config, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for model in (SpeechCLForCTC(config), SpeechCLForSequenceClassification(config)):
        labels = torch.tensor([[1, 2]]) if isinstance(model, SpeechCLForCTC) else torch.tensor([1])
        model.train()(torch.randn(1, 8000), labels=labels).loss.backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("model_class", [SpeechCLForCTC, SpeechCLForSequenceClassification])
def test_transformers_trainer_gives_the_same_update_in_one_batch_and_by_accumulation(model_class, tmp_path):
    config = SpeechCLConfig(**TINY, ctc_loss_reduction="mean", num_labels=3)
    labels = [[1, 2]] if model_class is SpeechCLForCTC else [0, 1, 2]
    samples = torch.randn(4, 8000).numpy()
    data = [{"input_values": clip, "labels": labels[number % len(labels)]} for number, clip in enumerate(samples)]
    moved = []
    for batch, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = model_class(config)
        before = model.speechcl.feature_projection.weight.detach().clone()
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            use_cpu=True, report_to="none", save_strategy="no", optim="sgd", max_grad_norm=0, learning_rate=0.1,
            lr_scheduler_type="constant", disable_tqdm=True,
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=data).train()
        moved.append(model.speechcl.feature_projection.weight.detach() - before)
    assert moved[0].any()
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-7)


def test_weighted_layer_sum_gives_hidden_states_when_asked_for(config):
    config.use_weighted_layer_sum = True
    model, samples = SpeechCLForCTC(config).eval(), torch.randn(1, 8000)
    assert model(samples).keys() == {"logits"}
    assert len(model(samples, output_hidden_states=True).hidden_states) == config.num_hidden_layers + 1


def test_attention_mask_may_be_of_any_dtype(config):
    model, mask = SpeechCLForCTC(config).eval(), torch.ones(2, 8000)
    mask[1, 4001:] = 0
    samples, labels = torch.randn(2, 8000), torch.tensor([[1, 2], [3, -100]])
    for dtype in (torch.float32, torch.float16):
        found = model(samples, mask.to(dtype), labels=labels)
        torch.testing.assert_close(found.logits, model(samples, mask.int()).logits, rtol=0, atol=0)
        assert torch.isfinite(found.loss)


def test_layerdrop_bypasses_whole_layers_in_training_only(clips):
    model = SpeechCLModel(SpeechCLConfig(**TINY, layerdrop=0.9999999))
    values = torch.from_numpy(clips[0])[None]
    hidden_states = model.train()(values, output_hidden_states=True).hidden_states
    dropped = model(values).last_hidden_state
    torch.testing.assert_close(dropped, model.norm(hidden_states[0]))
    torch.testing.assert_close(hidden_states[1], hidden_states[0])
    assert not torch.allclose(model.eval()(values).last_hidden_state, dropped)


def test_hidden_states_and_attentions_have_their_shapes(config, clips):
    model = SpeechCLModel(config).eval()
    model.set_attn_implementation("eager")
    outputs = model(torch.from_numpy(clips[0])[None], output_hidden_states=True, output_attentions=True)
    frames = outputs.last_hidden_state.shape[1]
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    assert [tuple(a.shape) for a in outputs.attentions] == [(1, config.num_attention_heads, frames, frames)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(1, config.num_attention_heads, frames))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_named_sizes_have_their_parameters(size):
    with torch.device("meta"):
        model = SpeechCLModel(SpeechCLConfig.from_size(size))
    millions = {"tiny": 5, "small": 22, "base": 86, "large": 304}[size]
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("subsampling_factor", 3, "subsampling_factor must be 2, 4 or 8"),
        ("hidden_size", 30, "hidden_size"),
        ("hop_length", 500, "hop_length"),
        ("ctc_loss_reduction", "none", "ctc_loss_reduction"),
        ("layerdrop", 1.5, "layerdrop"),
        ("log_mel_floor", 0.0, "log_mel_floor must be above 0"),
        ("log_mel_std", 0.0, "log_mel_std must be above 0"),
        ("conv_depthwise_kernel_size", 4, "conv_depthwise_kernel_size must be odd"),
    ],
)
def test_impossible_configuration_is_refused_by_name(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        SpeechCLConfig(**{field: value})


def test_empty_waveform_is_refused(config):
    with pytest.raises(ValueError, match="samples > 0"):
        SpeechCLModel(config)(torch.zeros(1, 0))


def test_label_outside_the_vocabulary_is_refused(config):
    with pytest.raises(ValueError, match="outside the vocabulary of 32"):
        SpeechCLForCTC(config)(torch.randn(1, 16000), labels=torch.tensor([[32]]))
