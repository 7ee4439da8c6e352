"""Losses and quantisers in plain loops, straight from the papers' equations: what the fast ones are held against."""

import math

import torch
from transformers.audio_utils import mel_filter_bank


def mel_filters(config):
    """Triangular filters on Kaldi's mel scale: (257, num_mel_bins) for frames of 400 samples."""
    filters = mel_filter_bank(
        num_frequency_bins=257,
        num_mel_filters=config.num_mel_bins,
        min_frequency=20.0,
        max_frequency=config.sampling_rate / 2,
        sampling_rate=config.sampling_rate,
        mel_scale="kaldi",
        triangularize_in_mel_space=True,
    )
    return torch.from_numpy(filters)


def log_mel(samples, config):
    """Frame by frame: 400 samples around each hop less their mean, Hann window, FFT of 512 points, mel filters, log."""
    padded = torch.cat((samples.new_zeros(120), samples, samples.new_zeros(400)))
    window = torch.hann_window(400, periodic=False, dtype=samples.dtype)
    frames = []
    for start in range(0, len(samples), 160):
        frame = padded[start : start + 400]
        power = torch.fft.rfft((frame - frame.mean()) * window, n=512).abs() ** 2
        energies = (power @ mel_filters(config).to(samples.dtype)).clamp_min(config.log_mel_floor)
        frames.append((energies.log() - config.log_mel_mean) / config.log_mel_std)
    return torch.stack(frames)


def best_rq_codes(frames, projection, codebook):
    """Chiu et al. 2022, eq. 1: argmin over j of || norm(c_j) - norm(A x) ||. Lists of codes, one list per frame."""
    codes = []
    for frame in frames:
        row = []
        for matrix, codewords in zip(projection, codebook):
            point = frame @ matrix
            point = point / point.norm()
            distances = [
                (point - codewords[:, j] / codewords[:, j].norm()).norm().item() for j in range(codewords.shape[1])
            ]
            row.append(distances.index(min(distances)))
        codes.append(row)
    return codes


def masked_prediction_loss(logits, codes):
    """Cross-entropy of each frame and codebook, averaged over codebooks, summed over frames."""
    total = 0.0
    for frame_logits, frame_codes in zip(logits.tolist(), codes.tolist()):
        for scores, code in zip(frame_logits, frame_codes):
            total += (math.log(sum(math.exp(score) for score in scores)) - scores[code]) / len(frame_codes)
    return total


def unit_loss(predictions, embeddings, units, temperature):
    """Hsu et al. 2021, eq. 3, summed over masked frames: softmax over units of cosine similarity / temperature."""
    total = 0.0
    for prediction, unit in zip(predictions, units.tolist()):
        scores = []
        for embedding in embeddings:
            cosine = (torch.dot(prediction, embedding) / (prediction.norm() * embedding.norm())).item()
            scores.append(math.exp(cosine / temperature))
        total -= math.log(scores[unit] / sum(scores))
    return total


def contrastive_loss(predictions, targets, codes, negatives, temperature):
    """Baevski et al. 2020, eq. 3, summed over masked frames; distractors with the codes of the target are left out."""

    def similarity(a, b):
        return (torch.dot(a, b) / (a.norm() * b.norm())).item()

    total = 0.0
    for frame in range(len(predictions)):
        positive = math.exp(similarity(predictions[frame], targets[frame]) / temperature)
        denominator = positive
        for other in negatives[frame].tolist():
            if codes[other].tolist() != codes[frame].tolist():
                denominator += math.exp(similarity(predictions[frame], targets[other]) / temperature)
        total -= math.log(positive / denominator)
    return total


def diversity_loss(probabilities, clips):
    """(GV - sum over groups of exp(entropy of the clip's mean distribution)) / GV for every clip, times its frames."""
    total = 0.0
    for clip in sorted(set(clips.tolist())):
        rows = [row for row, owner in zip(probabilities.tolist(), clips.tolist()) if owner == clip]
        num_groups, num_codes = len(rows[0]), len(rows[0][0])
        perplexities = 0.0
        for group in range(num_groups):
            mean = [sum(row[group][code] for row in rows) / len(rows) for code in range(num_codes)]
            perplexities += math.exp(-sum(p * math.log(p + 1e-7) for p in mean))
        total += len(rows) * (num_groups * num_codes - perplexities) / (num_groups * num_codes)
    return total


def _unit(vector):
    return vector / vector.norm()


def nt_xent(embeddings, labels, temperature):
    """Chen et al. 2020, algorithm 1: -log of the positive's share, of both views of every clip; clips of the same label
    are no negatives."""
    views = [(clip, view) for clip in range(len(embeddings)) for view in range(2)]

    def score(a, b):
        return math.exp(torch.dot(_unit(embeddings[a]), _unit(embeddings[b])).item() / temperature)

    total = 0.0
    for clip, view in views:
        positive = score((clip, view), (clip, 1 - view))
        negatives = sum(score((clip, view), other) for other in views if labels[other[0]] != labels[clip])
        total -= math.log(positive / (positive + negatives))
    return total


def pair_losses(embeddings, labels, margin):
    """Hadsell et al. 2006, eq. 4, of every pair: (same, loss)."""
    pairs = []
    for first in range(len(embeddings)):
        for second in range(first + 1, len(embeddings)):
            distance = (_unit(embeddings[first]) - _unit(embeddings[second])).norm().item()
            same = bool(labels[first] == labels[second])
            pairs.append((same, 0.5 * distance**2 if same else 0.5 * max(0.0, margin - distance) ** 2))
    return pairs


def simsiam(predictions, targets):
    """Chen and He 2020, algorithm 1, plus one for each clip."""
    total = 0.0
    for p, z in zip(predictions, targets):
        total += 1 - torch.dot(_unit(p[0]), _unit(z[1])).item() / 2 - torch.dot(_unit(p[1]), _unit(z[0])).item() / 2
    return total


def triplet_gaps(embeddings, labels, mining):
    """Schroff et al. 2015 and Hermans et al. 2017: squared distance to the positive less that to the negative."""
    count = len(embeddings)

    def distance(a, b):
        return ((_unit(embeddings[a]) - _unit(embeddings[b])) ** 2).sum().item()

    gaps = []
    for anchor in range(count):
        positives = [distance(anchor, j) for j in range(count) if j != anchor and labels[j] == labels[anchor]]
        negatives = [distance(anchor, j) for j in range(count) if labels[j] != labels[anchor]]
        if not positives or not negatives:
            continue
        if mining == "batch_hard":
            gaps.append(max(positives) - min(negatives))
        elif mining == "batch_all":
            gaps += [positive - negative for positive in positives for negative in negatives]
        else:
            for positive in positives:
                farther = [negative for negative in negatives if negative > positive]
                gaps.append(positive - (min(farther) if farther else max(negatives)))
    return gaps


def prototypical_loss(support, queries, targets, distance, temperature):
    """Snell et al. 2017, algorithm 1, one episode: support (W, K, D), queries (Q, D), targets (Q,)."""
    prototypes = [sum(examples) / len(examples) for examples in support]
    total = 0.0
    for query, target in zip(queries, targets.tolist()):
        if distance == "cosine":
            scores = [torch.dot(_unit(query), _unit(prototype)).item() / temperature for prototype in prototypes]
        else:
            scores = [-((query - prototype) ** 2).sum().item() / temperature for prototype in prototypes]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[target]
    return total


def cpc_loss(context, features, negatives, matrices):
    """Van den Oord et al. 2018, eq. 3 and 4, of one clip: context (T, H), features (T, C), negatives (T, K) frames."""
    total = 0.0
    for step, matrix in enumerate(matrices, start=1):
        for time in range(len(context) - step):
            prediction = matrix @ context[time]
            scores = [torch.dot(prediction, features[time + step]).item()]
            scores += [torch.dot(prediction, features[other]).item() for other in negatives[time + step]]
            total += math.log(sum(math.exp(score) for score in scores)) - scores[0]
    return total


def normalize_over_time(frames, length):
    """Every channel of one clip's first `length` frames to mean 0 and variance 1; zeros after them."""
    result = torch.zeros_like(frames)
    for channel in range(frames.shape[1]):
        values = [frames[time, channel].item() for time in range(length)]
        mean = sum(values) / length
        variance = sum((value - mean) ** 2 for value in values) / length
        for time, value in enumerate(values):
            result[time, channel] = (value - mean) / math.sqrt(variance + 1e-5)
    return result


def reconstruction_loss(predictions, targets, norm):
    """Mean over channels of the absolute or squared error, summed over frames."""
    total = 0.0
    for predicted, target in zip(predictions.tolist(), targets.tolist()):
        errors = [abs(a - b) if norm == "l1" else (a - b) ** 2 for a, b in zip(predicted, target)]
        total += sum(errors) / len(errors)
    return total


def dtw_distance(first, second):
    """Mean angle (1 for 180°) along the cheapest path; of equal ways both tokens go on, or else the second."""

    def angle(one, other):
        dot = sum(x * y for x, y in zip(one, other))
        norms = math.sqrt(sum(x * x for x in one)) * math.sqrt(sum(y * y for y in other))
        return math.acos(min(max(dot / norms, -1.0), 1.0)) / math.pi

    best = {}
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            before = [best[place] for place in [(i - 1, j - 1), (i, j - 1), (i - 1, j)] if place in best]
            cost, length = min(before, key=lambda entry: entry[0]) if before else (0.0, 0)
            best[i, j] = (cost + angle(one, other), length + 1)
    cost, length = best[len(first) - 1, len(second) - 1]
    return cost / length


def abx_error(tokens, categories, groups):
    """Schatz et al. 2013: for each group and ordered pair of categories all triples, then means over groups, directions
    and pairs."""
    pair_errors = []
    names = sorted(set(categories))
    for number, one in enumerate(names):
        for other in names[number + 1 :]:
            directions = []
            for same, different in [(one, other), (other, one)]:
                errors = []
                for group in sorted(set(groups)):
                    own = [t for t, c, g in zip(tokens, categories, groups) if c == same and g == group]
                    others = [t for t, c, g in zip(tokens, categories, groups) if c == different and g == group]
                    scores = []
                    for x in range(len(own)):
                        for a in range(len(own)):
                            for b in range(len(others)):
                                if a != x:
                                    to_a = dtw_distance(own[a], own[x])
                                    to_b = dtw_distance(others[b], own[x])
                                    scores.append(1.0 if to_a > to_b else 0.5 if to_a == to_b else 0.0)
                    if scores:
                        errors.append(sum(scores) / len(scores))
                if errors:
                    directions.append(sum(errors) / len(errors))
            if directions:
                pair_errors.append(sum(directions) / len(directions))
    return sum(pair_errors) / len(pair_errors)
