"""Clips → padded batches with everything that is drawn at random, so that the model draws nothing.

A batch always holds `input_values` (B, S) float32 and `num_skipped`, the number of clips left out because they could
not be decoded; `attention_mask` (B, S), 1 on samples and 0 on padding, only where something is padded. A batch of
which no clip is left holds a tenth of a second of silence with nothing to learn from, so that all ranks go on in step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .masking import draw_negatives, span_mask


def pad_waveforms(clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """`input_values` (B, S), padded with zeros at the end, and `attention_mask` (B, S) int64 where lengths differ."""
    lengths = np.array([len(clip) for clip in clips])
    input_values = np.zeros((len(clips), lengths.max()), dtype=np.float32)
    for row, clip in zip(input_values, clips):
        row[: len(clip)] = clip
    batch = {"input_values": torch.from_numpy(input_values)}
    if (lengths < lengths.max()).any():
        batch["attention_mask"] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).long()
    return batch


def stack_rows(rows: list[np.ndarray], width: int, fill=0) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, width)."""
    stacked = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for target, row in zip(stacked, rows):
        target[: len(row)] = row
    return torch.from_numpy(stacked)


def begin_batch(clips: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The clips that could be decoded, and a batch of their waveforms."""
    usable = [clip for clip in clips if clip["input_values"] is not None]
    batch = pad_waveforms([clip["input_values"] for clip in usable] or [np.zeros(1600, dtype=np.float32)])
    batch["num_skipped"] = torch.tensor(len(clips) - len(usable))
    return usable, batch


def draw_masks(
    clips: list[dict],
    rngs: list[np.random.Generator],
    batch: dict[str, torch.Tensor],
    frame_length: Callable[[int], int],
    mask_prob: float,
    span: int,
) -> tuple[torch.Tensor, list[int]]:
    """Span masks of all clips, (B, T) bool, and the number of masked frames of each."""
    lengths = [frame_length(len(clip["input_values"])) for clip in clips]
    masks = [span_mask(length, mask_prob, span, rng) for length, rng in zip(lengths, rngs)]
    num_frames = frame_length(batch["input_values"].shape[1])
    return stack_rows(masks or [np.zeros(0, dtype=bool)], num_frames, False), [mask.sum() for mask in masks]


@dataclass
class PretrainingCollator:
    """Batches for `SpeechCLForPreTraining`.

    Adds `mask_time_indices` (B, T) bool, and with `num_negatives` > 0 `negative_indices` (M, num_negatives): for each
    of the batch's M masked frames, in row-major order, the positions among those M of its negatives, which are of the
    same clip.

    Args:
        frame_length: encoder frames of a number of samples (`_get_feat_extract_output_lengths`).
        mask_prob, mask_span: see `span_mask`; the span is in encoder frames.
        num_negatives: negatives for a masked frame.
    """

    frame_length: Callable[[int], int]
    mask_prob: float = 0.65
    mask_span: int = 5
    num_negatives: int = 0

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        usable, batch = begin_batch(clips)
        rngs = [np.random.default_rng(clip["seed"]) for clip in usable]
        batch["mask_time_indices"], counts = draw_masks(
            usable, rngs, batch, self.frame_length, self.mask_prob, self.mask_span
        )
        if self.num_negatives:
            offsets = np.cumsum([0, *counts])
            negatives = [
                draw_negatives(count, self.num_negatives, rng) + offset
                for count, offset, rng in zip(counts, offsets, rngs)
            ]
            batch["negative_indices"] = torch.from_numpy(
                np.concatenate([np.zeros((0, self.num_negatives), dtype=np.int64), *negatives])
            )
        return batch


@dataclass
class CTCCollator:
    """Batches for `SpeechCLForCTC`.

    Adds `labels` (B, L), padded with -100, and `index` (B,), the clips' places in the data set; with masking,
    `mask_time_indices` (B, T) and `mask_feature_indices` (B, num_mel_bins), both bool.

    Args:
        frame_length: encoder frames of a number of samples.
        labels: token ids of every clip of the data set, by index.
        mask_time_prob, mask_time_span: masked encoder frames, see `span_mask`; 0 for evaluation.
        num_mel_bins, num_feature_masks, mask_feature_span: mel bins, how many bands of them are masked, and their
            greatest width (Park et al. 2019, arXiv 1904.08779).
    """

    frame_length: Callable[[int], int]
    labels: list[list[int]]
    mask_time_prob: float = 0.0
    mask_time_span: int = 5
    num_mel_bins: int = 80
    num_feature_masks: int = 0
    mask_feature_span: int = 20

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        usable, batch = begin_batch(clips)
        labels = [np.asarray(self.labels[clip["index"]], dtype=np.int64) for clip in usable] or [np.zeros(0, np.int64)]
        batch["labels"] = stack_rows(labels, max(len(row) for row in labels), -100)
        batch["index"] = torch.tensor([clip["index"] for clip in usable], dtype=torch.long)
        rngs = [np.random.default_rng(clip["seed"]) for clip in usable]
        if self.mask_time_prob > 0:
            batch["mask_time_indices"], _ = draw_masks(
                usable, rngs, batch, self.frame_length, self.mask_time_prob, self.mask_time_span
            )
        if self.num_feature_masks:
            bands = np.zeros((len(batch["input_values"]), self.num_mel_bins), dtype=bool)
            for row, rng in zip(bands, rngs):
                for width in rng.integers(self.mask_feature_span + 1, size=self.num_feature_masks):
                    start = rng.integers(self.num_mel_bins - width + 1)
                    row[start : start + width] = True
            batch["mask_feature_indices"] = torch.from_numpy(bands)
        return batch
