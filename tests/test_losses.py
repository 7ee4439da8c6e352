"""Losses and quantisers against plain-loop references, in float32 and under bfloat16 autocast."""

import math

import pytest
import torch
from torch import nn

from hf_speechcl import SpeechCLConfig
from hf_speechcl.objectives.best_rq import masked_prediction_loss
from hf_speechcl.objectives.cpc import cpc_logits
from hf_speechcl.objectives.data2vec import regression_loss, top_layers_target
from hf_speechcl.objectives.denoising import reconstruction_loss
from hf_speechcl.objectives.info_nce import nt_xent_logits
from hf_speechcl.objectives.prototypical import draw_episodes, prototype_logits
from hf_speechcl.objectives.siamese import Siamese, pair_losses, simsiam_loss
from hf_speechcl.objectives.targets import normalize_over_time, stack_frames
from hf_speechcl.objectives.triplet import MINING, Triplet, triplet_gaps
from hf_speechcl.objectives.wav2vec2 import contrastive_logits, diversity_loss
from hf_speechcl.quantizers import (
    GumbelVectorQuantizer,
    RandomProjectionQuantizer,
    code_histogram,
    code_usage,
    perplexity,
)
from tests import reference
from tests.conftest import TINY


@pytest.fixture(autouse=True, params=["float32", "autocast"])
def precision(request):
    """Every loss here is computed in float32, whether or not autocast is on around it."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=request.param == "autocast"):
        yield request.param


def assert_equal(loss, expected):
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_best_rq_codes_equal_reference():
    quantizer = RandomProjectionQuantizer(12, 4, 9, num_codebooks=3, seed=5)
    quantizer.init_weights()
    frames = torch.randn(20, 12)
    with torch.autocast("cpu", enabled=False):
        expected = reference.best_rq_codes(frames, quantizer.projection, quantizer.codebook)
    assert quantizer(frames).tolist() == expected


@pytest.mark.parametrize("frames", [0, 1, 13])
def test_masked_prediction_loss_equals_reference(frames):
    logits, codes = torch.randn(frames, 3, 11, requires_grad=True), torch.randint(11, (frames, 3))
    loss = masked_prediction_loss(logits, codes)
    loss.backward()
    assert_equal(loss, reference.masked_prediction_loss(logits, codes))


@pytest.mark.parametrize("same_codes", [False, True])
def test_wav2vec2_loss_equals_reference(same_codes):
    predictions, targets = torch.randn(9, 6), torch.randn(9, 6)
    codes = torch.zeros(9, 2, dtype=torch.long) if same_codes else torch.randint(3, (9, 2))
    negatives = torch.randint(9, (9, 5))
    logits = contrastive_logits(predictions, targets, codes, negatives, temperature=0.1)
    loss = -logits.log_softmax(-1)[:, 0].sum()
    assert_equal(loss, reference.contrastive_loss(predictions, targets, codes, negatives, 0.1))
    if same_codes:
        assert loss.item() == 0


def test_diversity_loss_equals_reference():
    probabilities = torch.randn(12, 2, 5).softmax(-1)
    clips = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 3])
    assert_equal(diversity_loss(probabilities, clips, num_clips=4), reference.diversity_loss(probabilities, clips))


def test_diversity_loss_is_zero_for_even_use_and_largest_for_one_code():
    even = torch.full((4, 2, 8), 1 / 8)
    one = nn.functional.one_hot(torch.zeros(4, 2, dtype=torch.long), 8).float()
    clips = torch.zeros(4, dtype=torch.long)
    assert diversity_loss(even, clips, 1).item() == pytest.approx(0, abs=1e-4)
    assert diversity_loss(one, clips, 1).item() == pytest.approx(4 * (16 - 2) / 16, rel=1e-4)


def vectors(kind, *shape):
    """Random vectors; or all equal; or each view of a clip the same."""
    if kind == "equal":
        return torch.ones(shape)
    drawn = torch.randn(shape)
    return drawn[:, :1].expand(shape).clone() if kind == "equal views" else drawn


KINDS = ["random", "equal", "equal views"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [[0], [0, 1], [0, 1, 2, 3, 1], [4, 4, 4]])
def test_nt_xent_equals_reference(labels, kind):
    embeddings, labels = vectors(kind, len(labels), 2, 6).requires_grad_(), torch.tensor(labels)
    logits = nt_xent_logits(embeddings, labels, torch.tensor(0.2))
    loss = -logits.log_softmax(-1)[:, 0].sum()
    loss.backward()
    assert embeddings.grad.isfinite().all()
    assert_equal(loss, reference.nt_xent(embeddings, labels, 0.2))


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 1, 0, 2, 1]])
def test_pair_losses_equal_reference(labels, kind):
    embeddings, labels = vectors(kind, len(labels), 6).requires_grad_(), torch.tensor(labels)
    losses, _, same = pair_losses(embeddings, labels, margin=1.2)
    losses.sum().backward()
    assert embeddings.grad.isfinite().all()
    expected = reference.pair_losses(embeddings, labels, 1.2)
    assert same.tolist() == [pair[0] for pair in expected]
    assert losses.tolist() == pytest.approx([pair[1] for pair in expected], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clips", [1, 4])
def test_simsiam_loss_equals_reference(clips, kind):
    predictions, targets = torch.randn(clips, 2, 6), vectors(kind, clips, 2, 6)
    assert_equal(simsiam_loss(predictions, targets), reference.simsiam(predictions, targets))
    assert simsiam_loss(targets, targets.flip(1)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("labels", [[0], [0, 0], [0, 1], [0, 0, 1], [0, 1, 0, 2, 1, 1]])
@pytest.mark.parametrize("mining", MINING)
def test_triplet_gaps_equal_reference(mining, labels, kind):
    embeddings, labels = vectors(kind, len(labels), 6).requires_grad_(), torch.tensor(labels)
    gaps = triplet_gaps(embeddings, labels, mining)
    gaps.sum().backward()
    assert embeddings.grad.isfinite().all()
    assert gaps.tolist() == pytest.approx(reference.triplet_gaps(embeddings, labels, mining), abs=1e-5)


@pytest.mark.parametrize("soft_margin", [False, True])
@pytest.mark.parametrize("mining", MINING)
def test_triplet_loss_is_the_sum_over_the_gaps(mining, soft_margin):
    objective = Triplet(SpeechCLConfig(**TINY), mining=mining, margin=0.3, soft_margin=soft_margin)
    embeddings, labels = torch.randn(4, 2, 6), torch.tensor([0, 1, 0, 2])
    gaps = reference.triplet_gaps(embeddings.flatten(0, 1), labels.repeat_interleave(2), mining)
    losses = [math.log1p(math.exp(gap)) if soft_margin else max(0.0, 0.3 + gap) for gap in gaps]
    output = objective.contrast(embeddings, labels, labels)
    assert output.loss.item() == pytest.approx(sum(losses), abs=1e-4)
    counted = [loss for loss in losses if loss > 0] if mining == "batch_all" and not soft_margin else losses
    assert output.num_items == len(counted) > 0


def test_siamese_loss_counts_pairs_of_a_class_as_much_as_all_others():
    objective = Siamese(SpeechCLConfig(**TINY), margin=1.2)
    embeddings, labels = torch.randn(4, 2, 6), torch.tensor([0, 1, 0, 2])
    pairs = reference.pair_losses(embeddings.flatten(0, 1), labels.repeat_interleave(2), 1.2)
    same, apart = ([loss for is_same, loss in pairs if is_same == wanted] for wanted in (True, False))
    output = objective.contrast(embeddings, labels, labels)
    assert output.loss.item() == pytest.approx(sum(same) + len(same) / len(apart) * sum(apart), abs=1e-4)
    assert output.num_items == 2 * len(same)


def test_simsiam_passes_no_gradient_through_its_targets_unless_asked_to():
    gradients = {}
    for stop_gradient in (True, False):
        torch.manual_seed(0)
        objective = Siamese(
            SpeechCLConfig(**TINY), form="simsiam", stop_gradient=stop_gradient, proj_dim=6, batch_norm=False
        )
        embeddings, labels = torch.randn(3, 2, 6, requires_grad=True), torch.arange(3)
        objective.contrast(embeddings, labels, labels).loss.backward()
        gradients[stop_gradient] = embeddings.grad
        if stop_gradient:
            predictions = objective.predictor(embeddings.flatten(0, 1)).view_as(embeddings)
            (expected,) = torch.autograd.grad(simsiam_loss(predictions, embeddings.detach()), embeddings)
            torch.testing.assert_close(embeddings.grad, expected)
    assert not torch.allclose(gradients[True], gradients[False])


@pytest.mark.parametrize("kind", ["random", "equal"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypical_loss_equals_reference(distance, kind):
    support, queries, targets = vectors(kind, 4, 3, 6), vectors(kind, 7, 6), torch.randint(4, (7,))
    logits = prototype_logits(queries, support.mean(1).expand(7, -1, -1), distance, temperature=0.5)
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert_equal(loss, reference.prototypical_loss(support, queries, targets, distance, 0.5))


@pytest.mark.parametrize(("clips", "ways", "episodes"), [(0, 1, 0), (1, 1, 0), (2, 2, 1), (3, 3, 1), (7, 3, 3)])
def test_episodes_hold_every_clip_and_n_way_classes(clips, ways, episodes):
    labels, keys = torch.arange(clips) + 10, torch.randperm(clips)
    support, queries, episode, targets = draw_episodes(labels, keys, 3, n_way=3, k_shot=1, n_query=2)
    assert support.shape == (episodes, ways, 1)
    assert len(queries) == len(episode) == len(targets) == 2 * episodes * ways
    assert set(queries.tolist()) == {clip * 3 + view for clip in range(clips * bool(episodes)) for view in (1, 2)}
    assert (support[episode, targets, 0] // 3 == queries // 3).all()
    assert all(len(set(classes.flatten().tolist())) == ways for classes in support)


def test_episodes_of_labels_take_support_from_different_clips():
    labels, keys = torch.tensor([0, 1, 0, 1, 0, 2]), torch.arange(6)
    support, queries, _, targets = draw_episodes(labels, keys, 2, n_way=3, k_shot=2, n_query=2)
    assert support.tolist() == [[[0, 4], [2, 6]]]  # label 2 has one clip, so two views, of which none is left to ask
    assert queries.tolist() == [8, 1, 3, 7]
    assert targets.tolist() == [0, 0, 1, 1]


def test_episodes_do_not_depend_on_the_order_of_the_clips():
    labels, keys = torch.arange(7), torch.randperm(7)
    order = torch.randperm(7)
    first = draw_episodes(labels, keys, 2, 3, 1, 1)
    second = draw_episodes(labels[order], keys[order], 2, 3, 1, 1)
    assert (order[second[1] // 2] == first[1] // 2).all()


@pytest.mark.parametrize("frames", [[1], [2], [4, 9]])
def test_cpc_loss_equals_reference(frames):
    total, steps = sum(frames), 3
    context, features = torch.randn(total, 5), torch.randn(total, 6)
    matrices = torch.randn(steps, 6, 5)
    loss, expected, start = torch.zeros(()), 0.0, 0
    for count in frames:
        negatives = torch.randint(count, (count, 4))
        rows = slice(start, start + count)
        with torch.autocast("cpu", enabled=False):
            expected += reference.cpc_loss(context[rows], features[rows], negatives, matrices)
        for step, matrix in enumerate(matrices, start=1):
            now = torch.arange(start, max(start, start + count - step))
            with torch.autocast("cpu", enabled=False):
                predictions = context[now] @ matrix.T
            logits = cpc_logits(predictions, features, now + step, negatives[now + step - start] + start)
            loss = loss - logits.log_softmax(-1)[:, 0].sum()
        start += count
    assert_equal(loss, expected)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("frames", [0, 1, 9])
def test_reconstruction_loss_equals_reference(frames, norm):
    predictions, targets = torch.randn(frames, 7), torch.randn(frames, 7)
    assert_equal(
        reconstruction_loss(predictions, targets, norm), reference.reconstruction_loss(predictions, targets, norm)
    )


def test_data2vec_target_and_loss_equal_reference():
    layers, lengths = [torch.randn(2, 8, 5) * 3 + 1 for _ in range(3)], torch.tensor([8, 5])
    target = top_layers_target(layers, lengths)
    loud = [layer * 1000 for layer in layers]
    torch.testing.assert_close(
        top_layers_target([layer.half() for layer in loud], lengths), target, rtol=1e-2, atol=1e-2
    )
    for clip, length in enumerate(lengths.tolist()):
        expected = sum(reference.normalize_over_time(layer[clip], length) for layer in layers) / 3
        torch.testing.assert_close(target[clip], expected, rtol=1e-5, atol=1e-5)
    predictions = torch.randn(2, 5)
    assert_equal(
        regression_loss(predictions, target[0, :2]), reference.reconstruction_loss(predictions, target[0, :2], "l2")
    )


def test_target_frames_are_normalized_over_the_clip_alone():
    log_mel, lengths = torch.randn(3, 22, 4) * 5 + 2, torch.tensor([22, 13, 1])
    normalized = normalize_over_time(log_mel, lengths)
    for clip, length in enumerate(lengths.tolist()):
        expected = reference.normalize_over_time(log_mel[clip], length)
        torch.testing.assert_close(normalized[clip], expected, rtol=1e-4, atol=1e-5)
    stacked = stack_frames(normalized, num_frames=6, stack=4)
    assert stacked.shape == (3, 6, 16)
    torch.testing.assert_close(stacked[0, 1], normalized[0, 4:8].flatten())
    assert stack_frames(normalized[:, :9], num_frames=2, stack=8).shape == (3, 2, 32)


def test_gumbel_quantizer_picks_the_likeliest_code_in_evaluation():
    quantizer = GumbelVectorQuantizer(6, 8, 5, num_codebooks=2)
    quantizer.init_weights()
    codevectors, probabilities, codes = quantizer.eval()(torch.randn(7, 6), temperature=1.0)
    assert torch.equal(codes, probabilities.argmax(-1))
    for vector, row in zip(codevectors, codes):
        expected = torch.cat([quantizer.codevectors[group, code] for group, code in enumerate(row)])
        torch.testing.assert_close(vector.float(), expected, rtol=0.01, atol=0.01)


def test_gumbel_quantizer_passes_gradients_to_its_input_and_samples_in_training():
    quantizer = GumbelVectorQuantizer(6, 8, 5, num_codebooks=2)
    quantizer.init_weights()
    frames = torch.randn(50, 6, requires_grad=True)
    codevectors, _, codes = quantizer.train()(frames, temperature=2.0)
    codevectors.square().sum().backward()
    assert (frames.grad.abs().sum(-1) > 0).all()
    assert not torch.equal(codes, quantizer(frames, temperature=2.0)[2])


def test_best_rq_quantizer_depends_on_its_seed_alone():
    first, second, third = (RandomProjectionQuantizer(12, 4, 9, 2, seed=seed) for seed in (1, 1, 2))
    for number, quantizer in enumerate((first, second, third)):
        torch.manual_seed(number)
        quantizer.init_weights()
    for name in ("projection", "codebook"):
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=0)
        assert not torch.equal(getattr(first, name), getattr(third, name))


def test_perplexity_counts_codes_in_use():
    codes = torch.tensor([[0, 3], [1, 3], [2, 3], [3, 3]])
    histogram = code_histogram(codes, 6)
    assert histogram.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 0, 4, 0, 0]]
    torch.testing.assert_close(perplexity(histogram), torch.tensor([4.0, 1.0]))
    assert code_usage(histogram) == {"code_perplexity": pytest.approx(2.5), "codes_used": 2.5}
