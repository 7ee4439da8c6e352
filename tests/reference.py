"""Losses and quantisers in plain loops, straight from the papers' equations: what the fast ones are held against."""

import math

import torch


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
