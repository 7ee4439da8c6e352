"""Masks, negatives, batches and collators, on real clips."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_speechcl import load_corpus
from hf_speechcl.data import CTCCollator, DurationBatchSampler, LabelBatchSampler, PretrainingCollator, SpeechDataset
from hf_speechcl.data.masking import draw_negatives, span_mask
from tests.conftest import quieter


def frames(samples: int) -> int:
    return -(-samples // 640)


# ---- masks ----


@settings(deadline=None, max_examples=300)
@given(
    num_frames=st.integers(0, 400),
    mask_prob=st.floats(0, 1.5),
    span=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_span_mask_properties(num_frames, mask_prob, span, seed):
    mask = span_mask(num_frames, mask_prob, span, np.random.default_rng(seed))
    assert mask.shape == (num_frames,)
    assert np.array_equal(mask, span_mask(num_frames, mask_prob, span, np.random.default_rng(seed)))
    if num_frames < 3 or mask_prob == 0:
        assert not mask.any()
    else:
        assert 2 <= mask.sum() < num_frames


def test_masked_share_is_as_documented():
    rng = np.random.default_rng(0)
    share = np.mean([span_mask(300, 0.65, 10, rng).mean() for _ in range(300)])
    assert share == pytest.approx(1 - np.exp(-0.65), abs=0.02)


@given(num_masked=st.integers(0, 60), num_negatives=st.integers(1, 20), seed=st.integers(0, 1000))
def test_negatives_are_other_masked_frames(num_masked, num_negatives, seed):
    negatives = draw_negatives(num_masked, num_negatives, np.random.default_rng(seed))
    assert negatives.shape == (num_masked, num_negatives)
    if num_masked > 1:
        assert negatives.min() >= 0
        assert negatives.max() < num_masked
        assert (negatives != np.arange(num_masked)[:, None]).all()


def test_negatives_are_uniform_over_the_other_frames():
    negatives = draw_negatives(5, 20000, np.random.default_rng(0))
    shares = np.bincount(negatives[2], minlength=5) / 20000
    np.testing.assert_allclose(shares, [0.25, 0.25, 0, 0.25, 0.25], atol=0.02)


# ---- batches ----

durations_strategy = st.lists(st.floats(0.1, 30), min_size=1, max_size=200)


@settings(deadline=None, max_examples=200)
@given(
    durations=durations_strategy, max_seconds=st.floats(1, 100), epoch=st.integers(0, 5), world_size=st.integers(1, 4)
)
def test_batches_hold_every_clip_within_the_limit(durations, max_seconds, epoch, world_size):
    durations = np.array(durations)
    batches = []
    for rank in range(world_size):
        sampler = DurationBatchSampler(durations, max_seconds, seed=3, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        own = list(sampler)
        assert len(own) == len(sampler)
        batches += own
    assert all(key[0] == epoch for batch in batches for key in batch)
    indices = [[key[1] for key in batch] for batch in batches]
    assert set(sum(indices, [])) == set(range(len(durations)))
    for batch in indices:
        assert len(batch) == 1 or durations[batch].max() * len(batch) <= max_seconds * (1 + 1e-9)
    if world_size == 1:
        assert sorted(sum(indices, [])) == list(range(len(durations)))


def test_order_is_a_function_of_seed_and_epoch():
    durations = np.random.default_rng(0).uniform(1, 10, 300)

    def order(seed, epoch):
        sampler = DurationBatchSampler(durations, 30, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert [[key[1] for key in batch] for batch in order(0, 0)] != [[key[1] for key in batch] for batch in order(0, 1)]
    assert order(0, 1) != order(1, 1)


def test_evaluation_ranks_share_the_clips_without_repeats():
    durations = np.random.default_rng(0).uniform(1, 10, 101)
    samplers = [DurationBatchSampler(durations, 30, shuffle=False, rank=rank, world_size=3) for rank in range(3)]
    indices = [key[1] for sampler in samplers for batch in sampler for key in batch]
    assert sorted(indices) == list(range(101))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]


def test_little_of_a_batch_is_padding():
    durations = load_corpus("demo")["duration"]
    sampler = DurationBatchSampler(np.array(durations), 40)
    padded = sum(max(durations[i] for _, i in batch) * len(batch) for batch in sampler)
    assert padded / sum(durations) < 1.1


def test_batches_may_be_limited_in_clips():
    sampler = DurationBatchSampler(np.linspace(1, 3, 101), 1000, max_clips=8)
    assert sorted(key[1] for batch in sampler for key in batch) == list(range(101))
    assert max(map(len, sampler)) == 8


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=9),
    clips_per_batch=st.integers(1, 24),
    clips_per_label=st.integers(1, 5),
    world_size=st.integers(1, 3),
)
def test_batches_of_labels_hold_as_many_clips_of_each(sizes, clips_per_batch, clips_per_label, world_size):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if clips_per_batch < 2 * clips_per_label:
        with pytest.raises(ValueError, match="raise max_seconds_per_batch, and max_clips"):
            LabelBatchSampler(labels, clips_per_batch, clips_per_label)
        return
    for rank in range(world_size):
        sampler = LabelBatchSampler(labels, clips_per_batch, clips_per_label, rank=rank, world_size=world_size)
        sampler.set_epoch(3)
        batches = list(sampler)
        assert len(batches) == len(sampler) > 0
        assert batches == list(sampler)
        for batch in batches:
            found, counts = np.unique(labels[[key[1] for key in batch]], return_counts=True)
            assert len(found) == min(clips_per_batch // clips_per_label, len(sizes))
            assert len(set(batch)) == len(batch) <= clips_per_batch
            assert (counts == clips_per_label).all()


def test_labels_are_drawn_equally_often_and_their_clips_in_turn():
    labels = np.repeat([0, 1, 2], [200, 10, 40])
    sampler = LabelBatchSampler(labels, 8, 4, seed=1)
    clips = [key[1] for batch in sampler for key in batch]
    keys = [key for batch in sampler for key in batch]
    assert len(set(keys)) == len(keys)  # a clip that comes again has another seed
    shares = np.bincount(labels[clips], minlength=3) / len(clips)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    own = [index for index in clips if labels[index] == 1]
    assert all(len(set(own[start : start + 10])) == len(own[start : start + 10]) for start in range(0, len(own), 10))
    sampler.set_epoch(1)
    assert clips != [key[1] for batch in sampler for key in batch]


def test_one_label_alone_cannot_be_compared():
    with pytest.raises(ValueError, match="all clips have the same label"):
        LabelBatchSampler(np.zeros(5), 4, 2)


def test_clip_that_comes_again_has_a_seed_of_its_own(audio_folder):
    dataset = SpeechDataset(load_corpus(str(audio_folder)), 16000, seed=3)
    assert dataset[1, 2]["seed"] == (3, 1, 2)
    assert dataset[1, 2, 4]["seed"] == (3, 1, 2, 4)


# ---- collators ----


def make_items(clips, epoch=0):
    return [{"index": n, "label": 10 + n, "seed": (0, epoch, n), "input_values": clip} for n, clip in enumerate(clips)]


def test_what_is_drawn_for_a_clip_does_not_depend_on_its_batch(clips):
    collator = PretrainingCollator(frames, num_negatives=9)
    items = make_items(clips)
    together, alone = collator(items), collator(items[3:4])
    length = frames(len(clips[3]))
    mask = together["mask_time_indices"]
    assert torch.equal(mask[3, :length], alone["mask_time_indices"][0])
    before, own = mask[:3].sum(), mask[3].sum()
    assert torch.equal(together["negative_indices"][before : before + own] - before, alone["negative_indices"])


def test_masks_change_with_the_epoch(clips):
    collator = PretrainingCollator(frames)
    first, second = (collator(make_items(clips, epoch))["mask_time_indices"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_masks_stay_off_padding_and_negatives_in_their_clip(clips):
    batch = PretrainingCollator(frames, num_negatives=9)(make_items(clips))
    owners = batch["mask_time_indices"].nonzero()[:, 0]
    for row, clip in zip(batch["mask_time_indices"], clips):
        assert not row[frames(len(clip)) :].any()
    assert len(batch["negative_indices"]) == len(owners)
    assert (owners[batch["negative_indices"]] == owners[:, None]).all()


def test_clips_that_cannot_be_decoded_are_counted_and_left_out(clips):
    items = make_items(clips)
    items[1]["input_values"] = None
    for collator in (PretrainingCollator(frames), CTCCollator(frames, [[1]] * 5, mask_time_prob=0.5)):
        batch = collator(items)
        assert len(batch["input_values"]) == 4
        assert batch["num_skipped"] == 1
        nothing = collator([items[1]])
        assert nothing["num_skipped"] == 1
        assert not nothing["mask_time_indices"].any()


def test_ctc_collator_masks_and_labels(clips):
    labels = [[1, 2, 3], [4], [5, 6], [7], [8]]
    batch = CTCCollator(frames, labels, mask_time_prob=0.5, num_feature_masks=2, mask_feature_span=15)(
        make_items(clips)
    )
    assert batch["labels"][1].tolist() == [4, -100, -100]
    assert batch["index"].tolist() == [0, 1, 2, 3, 4]
    assert batch["mask_feature_indices"].shape == (5, 80)
    assert 0 < batch["mask_feature_indices"].float().mean() <= 30 / 80
    plain = CTCCollator(frames, labels)(make_items(clips))
    assert "mask_time_indices" not in plain
    assert "mask_feature_indices" not in plain


def test_shifted_clip_follows_on_its_own_beginning_mirrored(clips):
    collator = CTCCollator(frames, [[1]] * 5, max_shift=640)
    shifts = set()
    for item in make_items(clips):
        shifted = collator.shift(item)["input_values"]
        shift = len(shifted) - len(item["input_values"])
        assert 0 <= shift < 640
        assert (shifted[shift:] == item["input_values"]).all()
        assert (shifted[:shift] == item["input_values"][:shift][::-1]).all()
        assert (collator.shift(item)["input_values"] == shifted).all()
        shifts.add(shift)
    assert len(shifts) > 1
    assert collator(make_items(clips))["input_values"].shape[1] >= max(map(len, clips))


def views_of(batch, clip, num_views):
    lengths = batch["view_attention_mask"].sum(-1)
    rows = range(clip * num_views, (clip + 1) * num_views)
    return [batch["view_values"][row, : lengths[row]].numpy() for row in rows]


def test_views_are_crops_of_their_clip(clips):
    collate = PretrainingCollator(frames, num_views=3, max_view_samples=30000)
    batch = collate(make_items(clips))
    assert batch["view_values"].shape[0] == 15
    assert batch["clip_labels"].tolist() == [10, 11, 12, 13, 14]
    assert len(set(batch["clip_keys"].tolist())) == 5
    for number, clip in enumerate(clips):
        for view in views_of(batch, number, 3):
            longest = min(len(clip), 30000)
            assert 0.6 * longest - 1 <= len(view) <= longest
            starts = np.flatnonzero(clip[: len(clip) - len(view) + 1] == view[0])
            assert any(np.array_equal(clip[start : start + len(view)], view) for start in starts)


def test_views_and_corruptions_of_a_clip_do_not_depend_on_its_batch(clips):
    collate = PretrainingCollator(
        frames, num_views=2, view_augmentation=quieter, corrupt_input=True, corruption=quieter, max_band=10,
        log_mel_noise_prob=0.5, log_mel_noise_std=1.0, num_frame_negatives=4,
    )  # fmt: skip
    items = make_items(clips)
    together, alone = collate(items), collate(items[3:4])
    for first, second in zip(views_of(together, 3, 2), views_of(alone, 0, 2)):
        np.testing.assert_array_equal(first, second)
    samples, mel_frames = len(clips[3]), -(-len(clips[3]) // 160)
    torch.testing.assert_close(together["input_values"][3, :samples], alone["input_values"][0])
    torch.testing.assert_close(together["log_mel_noise"][3, :mel_frames], alone["log_mel_noise"][0])
    assert (together["log_mel_noise"][3, mel_frames:] == 0).all()
    torch.testing.assert_close(together["mask_feature_indices"][3], alone["mask_feature_indices"][0])
    assert together["clip_keys"][3] == alone["clip_keys"][0]


def test_corrupted_input_keeps_the_clean_one_and_the_masks(clips):
    clean = PretrainingCollator(frames)(make_items(clips))
    corrupted = PretrainingCollator(frames, corrupt_input=True, corruption=quieter)(make_items(clips))
    torch.testing.assert_close(corrupted["clean_values"], clean["input_values"])
    torch.testing.assert_close(corrupted["mask_time_indices"], clean["mask_time_indices"])
    assert (corrupted["input_values"].abs().amax(1) < clean["input_values"].abs().amax(1)).all()
    assert corrupted["frame_counts"].tolist() == [frames(len(clip)) for clip in clips]


def test_no_attention_mask_where_nothing_is_padded(clips):
    assert "attention_mask" not in PretrainingCollator(frames)(make_items(clips[:1]))
    assert "attention_mask" in PretrainingCollator(frames)(make_items(clips[:2]))


def test_collators_are_small_to_send_to_another_process(config):
    collator = CTCCollator(config.num_frames, [[1, 2]])
    assert len(pickle.dumps(collator)) < 10_000
    assert pickle.loads(pickle.dumps(collator)).frame_length(16000) == 25
