"""Clips → padded batches with everything that is drawn at random, so that the model draws nothing.

A batch always holds `input_values` (B, S) and `num_skipped`, the number of clips left out because they could not be
decoded; `attention_mask` (B, S) bool, true on samples and false on padding, only where something is padded. A batch of
which no clip is left holds a tenth of a second of silence with nothing to learn from, so that all ranks go on in step.

Waveforms of 16 bits stay such, a quarter of what float32 and a mask of integers would take on the way to the device,
where `float_waveforms` makes the float32 of them that models want. What is corrupted or augmented is float32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .audio import FULL_SCALE, to_float32
from .masking import draw_negatives, span_mask

VIEW_SHARE = (0.6, 1.0)


def pad_waveforms(clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """`input_values` (B, S), padded with zeros at the end, int16 if all clips are and float32 otherwise, and
    `attention_mask` (B, S) bool where lengths differ."""
    if len({clip.dtype for clip in clips}) > 1:
        clips = [to_float32(clip) for clip in clips]
    lengths = np.array([len(clip) for clip in clips])
    batch = {"input_values": stack_rows(clips, lengths.max())}
    if (lengths < lengths.max()).any():
        batch["attention_mask"] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
    return batch


def float_waveforms(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with its waveforms of 16 bits as float32 in [-1, 1), made where the batch is."""
    return {
        name: values.float().div_(FULL_SCALE) if values.dtype == torch.int16 else values
        for name, values in batch.items()
    }


def stack_rows(rows: list[np.ndarray], width: int, fill=0) -> torch.Tensor:
    """Rows of different lengths as one tensor (B, width)."""
    stacked = np.full((len(rows), width), fill, dtype=rows[0].dtype)
    for target, row in zip(stacked, rows):
        target[: len(row)] = row
    return torch.from_numpy(stacked)


def begin_batch(clips: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The clips that could be decoded, and a batch of their waveforms."""
    usable = [clip for clip in clips if clip["input_values"] is not None]
    batch = pad_waveforms([clip["input_values"] for clip in usable] or [np.zeros(1600, dtype=np.int16)])
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


def join_negatives(counts: list[int], num_negatives: int, rngs: list[np.random.Generator]) -> torch.Tensor:
    """Negatives of every clip's counted frames, as positions among those of the whole batch: (sum of counts, K)."""
    offsets = np.cumsum([0, *counts])
    negatives = [
        draw_negatives(count, num_negatives, rng) + offset for count, offset, rng in zip(counts, offsets, rngs)
    ]
    return torch.from_numpy(np.concatenate([np.zeros((0, num_negatives), dtype=np.int64), *negatives]))


def draw_bands(
    rngs: list[np.random.Generator], batch: dict[str, torch.Tensor], num_mel_bins: int, num_bands: int, max_band: int
) -> torch.Tensor:
    """Bands of 0 to max_band mel bins, num_bands for every clip: (B, num_mel_bins) bool (Park et al. 2019,
    arXiv 1904.08779)."""
    bands = np.zeros((len(batch["input_values"]), num_mel_bins), dtype=bool)
    for row, rng in zip(bands, rngs):
        for width in rng.integers(max_band + 1, size=num_bands):
            start = rng.integers(num_mel_bins - width + 1)
            row[start : start + width] = True
    return torch.from_numpy(bands)


@dataclass
class PretrainingCollator:
    """Batches for `SpeechCLForPreTraining`.

    Adds `mask_time_indices` (B, T) bool, `masked_positions` (M,), the masked frames counted over the whole batch in
    row-major order, and `frame_counts` (B,), the encoder frames of every clip; on request

    - `negative_indices` (M, num_negatives): for each of the batch's M masked frames the positions
      among those M of its negatives, which are of the same clip;
    - `frame_negative_indices` (F, num_frame_negatives): the same among all F frames of the batch's clips;
    - `clean_values` (B, S), where `input_values` are corrupted;
    - `view_values` (B * num_views, S'), `view_attention_mask`, `clip_labels` (B,) and `clip_keys` (B,), see
      `UtteranceObjective`. A view is a crop, of 60 to 100% of its clip or of max_view_samples, if that is less;
    - `mask_feature_indices` (B, num_mel_bins) bool, a band of mel bins, and `log_mel_noise` (B, F, num_mel_bins);
    - `units` (B, T), padded with -100.

    What is drawn for a clip depends on its seed alone.

    Args:
        frame_length: encoder frames of a number of samples (`SpeechCLConfig.num_frames`).
        mask_prob, mask_span: see `span_mask`; the span is in encoder frames.
        num_negatives, num_frame_negatives: negatives for a masked frame, for any frame.
        corrupt_input: corrupt the input; targets are made of the clean one.
        corruption: what corrupts it, (waveform, generator) → waveform of the same length.
        num_views: views of each clip.
        max_view_samples: samples of a view, at most.
        view_augmentation: what is done to a view, (waveform, generator) → waveform of any length.
        max_band: widest band of mel bins, of num_mel_bins, that is blanked in a clip.
        log_mel_noise_prob, log_mel_noise_std: share of clips with noise on their log-mel frames, one each hop_length
            samples, and its standard deviation.
        units: units of a clip by its index and its number of encoder frames (`data.units.ClipUnits`).
    """

    frame_length: Callable[[int], int]
    mask_prob: float = 0.65
    mask_span: int = 5
    num_negatives: int = 0
    num_frame_negatives: int = 0
    corrupt_input: bool = False
    corruption: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    num_views: int = 0
    max_view_samples: int = 48000
    view_augmentation: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None
    max_band: int = 0
    log_mel_noise_prob: float = 0.0
    log_mel_noise_std: float = 0.0
    num_mel_bins: int = 80
    hop_length: int = 160
    units: Callable[[int, int], np.ndarray] | None = None

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        usable, batch = begin_batch(clips)
        rngs = [np.random.default_rng(clip["seed"]) for clip in usable]
        batch["mask_time_indices"], counts = draw_masks(
            usable, rngs, batch, self.frame_length, self.mask_prob, self.mask_span
        )
        batch["masked_positions"] = batch["mask_time_indices"].flatten().nonzero()[:, 0]
        lengths = [int(self.frame_length(len(clip["input_values"]))) for clip in usable]
        batch["frame_counts"] = torch.tensor(lengths or [0])
        if self.num_negatives:
            batch["negative_indices"] = join_negatives(counts, self.num_negatives, rngs)
        if self.num_frame_negatives:
            batch["frame_negative_indices"] = join_negatives(lengths, self.num_frame_negatives, rngs)
        if self.num_views:
            self._add_views(usable, rngs, batch)
        if self.max_band:
            batch["mask_feature_indices"] = draw_bands(rngs, batch, self.num_mel_bins, 1, self.max_band)
        if self.log_mel_noise_prob:
            self._add_log_mel_noise(usable, rngs, batch)
        if self.corrupt_input and usable:
            batch["clean_values"] = batch["input_values"]
            corrupted = [self.corruption(to_float32(clip["input_values"]), rng) for clip, rng in zip(usable, rngs)]
            batch["input_values"] = pad_waveforms(corrupted)["input_values"]
        if self.units is not None:
            rows = [self.units(clip["index"], length) for clip, length in zip(usable, lengths)]
            num_frames = batch["mask_time_indices"].shape[1]
            batch["units"] = stack_rows(rows or [np.zeros(0, dtype=np.int64)], num_frames, -100)
        return batch

    def _add_views(self, usable: list[dict], rngs: list[np.random.Generator], batch: dict[str, torch.Tensor]) -> None:
        views = [
            self._view(clip["input_values"], rng) for clip, rng in zip(usable, rngs) for _ in range(self.num_views)
        ]
        padded = pad_waveforms(views or [np.zeros(1600, dtype=np.int16)])
        batch |= {f"view_{name.removeprefix('input_')}": values for name, values in padded.items()}
        batch["clip_labels"] = torch.tensor([clip["label"] for clip in usable], dtype=torch.long)
        batch["clip_keys"] = torch.tensor([rng.integers(2**62) for rng in rngs], dtype=torch.long)

    def _view(self, clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        length = max(1, int(min(len(clip), self.max_view_samples) * rng.uniform(*VIEW_SHARE)))
        start = rng.integers(len(clip) - length + 1)
        view = clip[start : start + length]
        return view if self.view_augmentation is None else self.view_augmentation(to_float32(view), rng)

    def _add_log_mel_noise(
        self, usable: list[dict], rngs: list[np.random.Generator], batch: dict[str, torch.Tensor]
    ) -> None:
        num_frames = -(-batch["input_values"].shape[1] // self.hop_length)
        noise = np.zeros((len(batch["input_values"]), num_frames, self.num_mel_bins), dtype=np.float32)
        for row, rng, clip in zip(noise, rngs, usable):
            if rng.random() < self.log_mel_noise_prob:
                own = row[: -(-len(clip["input_values"]) // self.hop_length)]
                own[:] = self.log_mel_noise_std * rng.standard_normal(own.shape, dtype=np.float32)
        batch["log_mel_noise"] = torch.from_numpy(noise)


@dataclass(kw_only=True)
class FineTuningCollator:
    """What is drawn for clips to train on: where their frames begin, masked spans of frames and bands of mel bins.

    Args:
        max_shift: up to so many samples are put before a clip, its own first ones mirrored, so that frames do not
            always begin where the clip does; 0 for evaluation.
        mask_time_prob, mask_time_span: masked encoder frames, see `span_mask`; 0 for evaluation.
        num_mel_bins, num_feature_masks, mask_feature_span: mel bins, how many bands of them are masked, and their
            greatest width (Park et al. 2019, arXiv 1904.08779).
    """

    max_shift: int = 0
    mask_time_prob: float = 0.0
    mask_time_span: int = 5
    num_mel_bins: int = 80
    num_feature_masks: int = 0
    mask_feature_span: int = 20

    def shift(self, clip: dict) -> dict:
        """The clip with samples before it."""
        samples = clip["input_values"]
        if samples is None or self.max_shift == 0:
            return clip
        num_samples = np.random.default_rng([*clip["seed"], 1]).integers(min(self.max_shift, len(samples)))
        return clip | {"input_values": np.concatenate([samples[:num_samples][::-1], samples])}

    def add_masks(self, usable: list[dict], batch: dict[str, torch.Tensor], frame_length: Callable[[int], int]) -> None:
        """Add `mask_time_indices` (B, T) and `mask_feature_indices` (B, num_mel_bins), both bool, where asked for."""
        rngs = [np.random.default_rng(clip["seed"]) for clip in usable]
        if self.mask_time_prob > 0:
            batch["mask_time_indices"], _ = draw_masks(
                usable, rngs, batch, frame_length, self.mask_time_prob, self.mask_time_span
            )
        if self.num_feature_masks:
            batch["mask_feature_indices"] = draw_bands(
                rngs, batch, self.num_mel_bins, self.num_feature_masks, self.mask_feature_span
            )


@dataclass
class CTCCollator(FineTuningCollator):
    """Batches for `SpeechCLForCTC`: adds masks, `labels` (B, L), padded with -100, and `index` (B,), the clips' places
    in the data set.

    Args:
        frame_length: encoder frames of a number of samples.
        labels: token ids of every clip of the data set, by index.
    """

    frame_length: Callable[[int], int]
    labels: list[list[int]]

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        usable, batch = begin_batch([self.shift(clip) for clip in clips])
        labels = [np.asarray(self.labels[clip["index"]], dtype=np.int64) for clip in usable] or [np.zeros(0, np.int64)]
        batch["labels"] = stack_rows(labels, max(len(row) for row in labels), -100)
        batch["index"] = torch.tensor([clip["index"] for clip in usable], dtype=torch.long)
        self.add_masks(usable, batch, self.frame_length)
        return batch


@dataclass
class ClassificationCollator(FineTuningCollator):
    """Batches for `SpeechCLForSequenceClassification`: adds masks, `labels` (B,) and `index` (B,), the clips' places in
    the data set.

    Args:
        frame_length: encoder frames of a number of samples.
        labels: class of every clip of the data set, by index.
    """

    frame_length: Callable[[int], int]
    labels: list[int]

    def __call__(self, clips: list[dict]) -> dict[str, torch.Tensor]:
        usable, batch = begin_batch([self.shift(clip) for clip in clips])
        batch["labels"] = torch.tensor([self.labels[clip["index"]] for clip in usable] or [-100])
        batch["index"] = torch.tensor([clip["index"] for clip in usable] or [-1])
        self.add_masks(usable, batch, self.frame_length)
        return batch
