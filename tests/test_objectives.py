"""The contract of every objective."""

import pytest
import torch
from torch import nn
from transformers import AutoModel

from hf_speechcl import OBJECTIVES, Objective, ObjectiveOutput, SpeechCLConfig, SpeechCLForPreTraining, SpeechCLModel
from hf_speechcl.modeling_speechcl import SpeechCLLogMel
from hf_speechcl.objectives import cpc
from hf_speechcl.objectives.base import first_is_best
from hf_speechcl.objectives.best_rq import BestRQ
from hf_speechcl.objectives.wav2vec2 import Wav2Vec2Contrastive
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import COMPARING, FAST_RUN, SMALL_OBJECTIVES, TINY, TINY_OPTIONS, make_batch

ADDITIVE = [name for name in OBJECTIVES if name not in COMPARING]
MASKED = [name for name, objective in OBJECTIVES.items() if objective.uses_mask]


def make_model(*names, **options):
    """A pre-training model with some of `SMALL_OBJECTIVES`, whose options may be changed."""
    objectives = {name: SMALL_OBJECTIVES[name] | options for name in names or SMALL_OBJECTIVES}
    return SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))


@pytest.mark.parametrize("name", ADDITIVE)
def test_item_count_is_known_before_the_forward_pass(name, clips):
    model = make_model(name).eval()
    batch = make_batch(model, clips)
    output = model(**batch).objectives[name]
    assert output.num_items == model.count_items(batch)[name] > 0
    if name in MASKED:
        assert output.num_items == batch["mask_time_indices"].sum()


@pytest.mark.parametrize("name", COMPARING)
def test_items_of_compared_clips(name, clips):
    output = make_model(name)(**make_batch(make_model(name), clips)).objectives[name]
    # Five clips: ten views, ten anchors, five pairs with as many others, two queries for each of 2 x 3 classes.
    assert output.num_items == {"info_nce": 10, "triplet": 10, "siamese": 10, "prototypical": 12}[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_trained_weight_gets_a_gradient_even_from_a_batch_without_items(name, clips):
    for usable in (clips, []):
        model = make_model(name)
        batch = make_batch(model, usable, **({} if usable else {"mask_prob": 0}))
        output = model(**batch)
        assert torch.isfinite(output.loss)
        output.loss.backward()
        without = [
            key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
        ]
        assert without == []
        if not usable:
            assert output.loss == 0


@pytest.mark.parametrize("name", MASKED)
def test_loss_with_nothing_masked_is_zero(name, clips):
    model = make_model(name)
    output = model(**make_batch(model, clips, mask_prob=0))
    assert output.loss == 0
    output.loss.backward()


@pytest.mark.parametrize("name", MASKED)
def test_loss_is_finite_with_all_but_one_frame_masked(name, clips):
    model = make_model(name)
    output = model(**make_batch(model, clips, mask_prob=50.0, mask_span=500))
    assert torch.isfinite(output.loss)
    assert output.loss > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_of_one_clip_is_finite(name, clips):
    model = make_model(name)
    output = model(**make_batch(model, clips[:1]))
    output.loss.backward()
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_under_bfloat16_autocast_is_close_to_float32(name, clips):
    model = make_model(name).eval()
    batch = make_batch(model, clips)
    expected = model(**batch).objectives[name].loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch).objectives[name].loss
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("name", COMPARING)
def test_labels_decide_which_clips_belong_together(name, clips):
    model = make_model(name).eval()
    batch = make_batch(model, clips, labels=[0, 1, 0, 1, 0])
    embedded = model.embed(batch)[name]
    with_labels = model.objectives[name].compare(embedded)
    without = model.objectives[name].compare(embedded | {"labels": torch.arange(5)})
    assert with_labels.loss != without.loss
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = model.objectives[name].compare({key: value[order] for key, value in embedded.items()})
    torch.testing.assert_close(shuffled.loss, with_labels.loss)
    assert shuffled.num_items == with_labels.num_items


@pytest.mark.parametrize(
    "options",
    [
        {"name": "siamese", "form": "simsiam"},
        {"name": "siamese", "form": "simsiam", "stop_gradient": False},
        {"name": "siamese", "margin": 0.7, "batch_norm": False},
        {"name": "triplet", "mining": "batch_all"},
        {"name": "triplet", "mining": "batch_hard", "soft_margin": True},
        {"name": "prototypical", "distance": "cosine", "temperature": 0.1, "k_shot": 2},
        {"name": "info_nce", "learned_temperature": True, "proj_layers": 1},
        {"name": "denoising", "masked_only": True, "norm": "l2"},
        {"name": "masked_reconstruction", "masked_only": False, "norm": "l2", "noise_prob": 1.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_change_the_loss(options, clips):
    name = options.pop("name")
    losses = []
    for changes in ({}, options):
        torch.manual_seed(0)
        model = make_model(name, **changes)
        output = model(**make_batch(model, clips))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        losses.append(output.loss.item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("options", [{"form": "simsiam"}, {"form": "simsiam", "batch_norm": False}])
def test_simsiam_without_clips_has_a_gradient_for_every_weight(options):
    model = make_model("siamese", **options)
    model(**make_batch(model, [], mask_prob=0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_triplets_that_all_keep_the_margin_have_a_loss_of_zero():
    objective = make_model("triplet", mining="batch_all", batch_norm=False).objectives["triplet"]
    embeddings = torch.eye(12)[:4].repeat_interleave(2, 0).view(4, 2, 12)
    output = objective.contrast(embeddings, torch.arange(4), torch.arange(4))
    assert output.loss == 0
    assert output.num_items == 1


def test_learned_temperature_starts_at_the_option_and_gets_a_gradient(clips):
    model = make_model("info_nce", learned_temperature=True, temperature=0.3)
    objective = model.objectives["info_nce"]
    assert objective.log_temperature.exp().item() == pytest.approx(0.3)
    model(**make_batch(model, clips)).loss.backward()
    assert objective.log_temperature.grad != 0
    objective.log_temperature.data.fill_(-10)
    objective.after_update(model.speechcl)
    assert objective.temperature.item() == pytest.approx(0.01)
    objective.temperature.backward()
    assert objective.log_temperature.grad != 0


@pytest.mark.parametrize("name", ["best_rq", "denoising", "masked_reconstruction"])
@pytest.mark.parametrize("num_samples", [1600, 6500, 7800])
def test_short_clips_have_whole_target_frames_at_a_low_rate(name, num_samples, clips):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, subsampling_factor=8, objectives={name: {}}))
    batch = make_batch(model, [clips[0][:num_samples]], corrupt_input=model.collator_options().get("corrupt_input"))
    assert torch.isfinite(model(**batch).loss)


def test_data2vec_refuses_an_encoder_without_layers(config):
    config.num_hidden_layers = 0
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        OBJECTIVES["data2vec"](config)


def test_one_view_of_one_clip_passes_the_batch_norm_by(clips):
    model = make_model("triplet")
    embedded = model.objectives["triplet"].train().embed(model.speechcl, make_batch(model, clips[:1]))
    assert torch.isfinite(model.objectives["triplet"].compare(embedded).loss)


def test_objectives_share_encoder_passes(pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config)
    batch = make_batch(model, clips, corrupt_input=False)
    calls = []
    model.speechcl.register_forward_hook(lambda module, args, options, output: calls.append(options), with_kwargs=True)
    outputs = model(**batch).objectives
    assert set(outputs) == set(OBJECTIVES)
    # The views once for four objectives; the masked batch once for wav2vec2, best_rq, hubert and data2vec; then the
    # causal pass of cpc, the unmasked one of denoising and the altered one of masked_reconstruction.
    assert [sorted(key for key, value in call.items() if value is not None) for call in calls] == [
        ["attention_mask"],
        ["attention_mask", "causal"],
        ["attention_mask", "mask_time_indices"],
        ["attention_mask"],
        ["attention_mask", "log_mel_noise", "mask_feature_indices", "mask_time_indices"],
    ]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("best_rq", "head"),
        ("wav2vec2", "project_prediction"),
        ("hubert", "project"),
        ("data2vec", "head"),
        ("masked_reconstruction", "head"),
    ],
)
def test_heads_work_on_masked_frames_only(name, head, clips):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives={name: SMALL_OBJECTIVES[name]}))
    rows = []
    layer = getattr(model.objectives[name], head)
    layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:-1]))
    batch = make_batch(model, clips)
    model(**batch)
    assert rows == [batch["mask_time_indices"][batch["mask_time_indices"]].shape]


@pytest.mark.parametrize("name", ["best_rq", "masked_reconstruction"])
def test_model_and_targets_share_one_log_mel(name, clips, monkeypatch):
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives={name: SMALL_OBJECTIVES[name]}))
    calls, forward = [], SpeechCLLogMel.forward
    monkeypatch.setattr(SpeechCLLogMel, "forward", lambda self, values: calls.append(self) or forward(self, values))
    model(**make_batch(model, clips))
    assert calls == [model.speechcl.log_mel]


def test_masked_objectives_together_run_the_encoder_once(clips):
    model = make_model("best_rq", "wav2vec2", "hubert", "data2vec")
    calls = []
    model.speechcl.register_forward_hook(lambda *args: calls.append(1))
    model(**make_batch(model, clips))
    assert len(calls) == 1


def test_loss_is_the_weighted_sum_of_means(pretraining_config, clips):
    model = SpeechCLForPreTraining(pretraining_config).eval()
    output = model(**make_batch(model, clips))
    means = {name: part.loss / part.num_items for name, part in output.objectives.items()}
    expected = sum(SMALL_OBJECTIVES[name]["weight"] * mean for name, mean in means.items())
    torch.testing.assert_close(output.loss, expected)
    assert set(means) == set(OBJECTIVES)


@pytest.mark.parametrize("name", [*(name for name in MASKED if name != "hubert"), "denoising"])
def test_targets_stay_clean_when_the_input_is_corrupted(name, clips):
    model = make_model(name).eval()
    clean = make_batch(model, clips, corrupt_input=False)
    corrupted = make_batch(model, clips, corrupt_input=True)
    torch.testing.assert_close(corrupted["clean_values"], clean["input_values"], rtol=0, atol=0)
    torch.testing.assert_close(corrupted["mask_time_indices"], clean["mask_time_indices"])
    assert not torch.equal(corrupted["input_values"], clean["input_values"])
    seen = {}
    objective = model.objectives[name]
    target = {"wav2vec2": "quantizer", "best_rq": "quantizer", "data2vec": "teacher"}.get(name, "targets")
    hook = getattr(objective, target).register_forward_hook(lambda module, args, output: seen.update({"out": output}))

    def target_of(batch):
        model(**batch)
        out = seen["out"]
        return out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)

    expected = target_of(clean)
    torch.testing.assert_close(target_of(corrupted), expected)
    del corrupted["clean_values"]
    assert not torch.equal(target_of(corrupted), expected)
    hook.remove()


def test_cpc_predicts_clean_frames_when_the_input_is_corrupted(clips, monkeypatch):
    model = make_model("cpc").eval()
    seen, scores = [], cpc.cpc_logits
    monkeypatch.setattr(cpc, "cpc_logits", lambda *args: seen.append(args[:2]) or scores(*args))
    for corrupt_input in (False, True):
        model(**make_batch(model, clips, corrupt_input=corrupt_input))
    (context, features), (corrupted_context, clean_features) = seen[0], seen[len(seen) // 2]
    torch.testing.assert_close(clean_features, features)
    assert not torch.equal(corrupted_context, context)


@pytest.mark.parametrize("kernel_size", [None, 5])
def test_context_of_cpc_knows_nothing_of_the_future(kernel_size):
    """Frame t of the causal encoder depends on the waveform up to what frame t covers, and on that too."""
    config = SpeechCLConfig(**TINY, conv_depthwise_kernel_size=kernel_size)
    encoder = SpeechCLModel(config).eval()
    samples = torch.randn(1, 16000)
    frame, ratio = 7, config.inputs_to_logits_ratio
    end = frame * ratio + encoder.causal_reach
    before = encoder(samples, causal=True)
    samples[:, end:] = torch.randn(1, 16000 - end)
    after = encoder(samples, causal=True)
    torch.testing.assert_close(after.last_hidden_state[:, : frame + 1], before.last_hidden_state[:, : frame + 1])
    assert not torch.equal(after.last_hidden_state[:, frame + 1], before.last_hidden_state[:, frame + 1])
    changed = (after.extract_features != before.extract_features).any(-1)[0].nonzero()[0].item()
    assert changed == frame + 1
    samples[:, end - 40 :] = torch.randn(1, 16040 - end)
    assert not torch.equal(encoder(samples, causal=True).last_hidden_state[:, frame], after.last_hidden_state[:, frame])
    assert end - frame * ratio < ratio + 160


@pytest.mark.parametrize("window", [None, 3])
def test_causal_attention_is_the_same_in_eager_and_sdpa(window, clips):
    encoder = SpeechCLModel(SpeechCLConfig(**TINY, sliding_window=window)).eval()
    outputs = []
    for implementation in ("eager", "sdpa"):
        encoder.set_attn_implementation(implementation)
        outputs.append(encoder(torch.from_numpy(clips[2])[None], causal=True).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_teacher_begins_as_the_encoder_and_follows_it(clips):
    model = make_model("data2vec", ema_decay_start=0.9, ema_decay_end=0.9)
    objective = model.objectives["data2vec"]
    model(**make_batch(model, clips))
    torch.testing.assert_close(dict(objective.teacher.named_parameters()), dict(model.speechcl.named_parameters()))
    with torch.no_grad():
        before = model.speechcl.norm.bias.clone()
        model.speechcl.norm.bias += 1.0
    model.set_progress(0.5)
    model.after_update()
    torch.testing.assert_close(objective.teacher.norm.bias, before + 0.1)
    model.train()
    assert not objective.teacher.training
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())


def test_teacher_is_saved_and_loaded_with_the_model(clips, tmp_path):
    model = make_model("data2vec", ema_decay_start=0.5, ema_decay_end=0.5)
    batch = make_batch(model, clips)
    model(**batch)
    with torch.no_grad():
        model.speechcl.norm.bias += 1.0
    model.after_update()
    model.save_pretrained(tmp_path)
    loaded = SpeechCLForPreTraining.from_pretrained(tmp_path)
    expected = model.eval()(**batch).loss
    torch.testing.assert_close(loaded.eval()(**batch).loss, expected, rtol=0, atol=0)
    assert not torch.equal(loaded.objectives["data2vec"].teacher.norm.bias, loaded.speechcl.norm.bias)


def test_ema_decay_rises_to_its_end(config):
    objective = OBJECTIVES["data2vec"](config, ema_decay_start=0.9, ema_decay_end=0.99, ema_anneal=0.5)
    decays = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        objective.set_progress(progress)
        decays.append(objective.decay)
    assert decays == pytest.approx([0.9, 0.945, 0.99, 0.99])


def test_equal_logits_are_at_chance():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [3.0, -torch.inf, 1.0]])
    assert first_is_best(logits).tolist() == pytest.approx([1, 1 / 3, 1 / 2, 0, 1])


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


class EnergyRegression(Objective):
    uses_mask = True

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


def test_adding_an_objective_takes_a_class_and_a_line(monkeypatch, clips, tmp_path):
    monkeypatch.setitem(OBJECTIVES, "energy", EnergyRegression)
    objectives = {"energy": {"weight": 2.0, "scale": 0.1}, "best_rq": {"codebook_size": 16}}
    model = SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))
    model(**make_batch(model, clips)).loss.backward()
    assert model.objectives["energy"].scale == 0.1
    assert model.objectives["energy"].head.weight.grad.abs().sum() > 0
    command = ["--objectives", "energy=2", "--objective_options", "energy.scale=0.1", "--max_steps", "2"]
    command += ["--encoder_options", *TINY_OPTIONS, *FAST_RUN, "--output_dir", str(tmp_path / "run")]
    pretrain(command)
    assert AutoModel.from_pretrained(tmp_path / "run").config.objectives == {"energy": {"weight": 2.0, "scale": 0.1}}


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"bestrq": {}}, "unknown objective 'bestrq': expected one of info_nce, siamese"),
        ({"best_rq": {"codebooks": 2}}, "'best_rq' has no option codebooks: it takes num_codebooks"),
        ({"best_rq": {"num_codebooks": 1.5}}, "best_rq.num_codebooks must be like its default 4, found 1.5"),
        ({"best_rq": {"codebook_size": 0}}, "best_rq.codebook_size must be positive, found 0"),
        ({"wav2vec2": {"temperature": -1}}, "wav2vec2.temperature must be positive"),
        ({"wav2vec2": {"num_negatives": "many"}}, "wav2vec2.num_negatives must be like its default 100, found 'many'"),
        ({"siamese": {"form": "twins"}}, "siamese.form must be one of contrastive, simsiam, found 'twins'"),
        ({"triplet": {"mining": "easy"}}, "triplet.mining must be one of batch_all, batch_hard, semi_hard"),
        ({"prototypical": {"n_way": 1}}, "prototypical.n_way must be at least 2, found 1"),
        (
            {"masked_reconstruction": {"max_band": 99}},
            "max_band must be at most the encoder's num_mel_bins, 80, found 99",
        ),
        ({"data2vec": {"ema_decay_end": 1.5}}, "data2vec.ema_decay_end must be at most 1, found 1.5"),
        ({"info_nce": {"learned_temperature": 3}}, "info_nce.learned_temperature must be like its default False"),
        ({}, "objectives is empty"),
    ],
)
def test_unknown_objective_or_option_is_refused_by_name(objectives, message):
    with pytest.raises(ValueError, match=message):
        SpeechCLForPreTraining(SpeechCLConfig(**TINY, objectives=objectives))
