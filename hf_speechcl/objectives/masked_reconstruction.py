"""Masked reconstruction: log-mel frames from a log-mel that was altered in time, channel and magnitude."""

from torch import nn

from .base import Objective, ObjectiveOutput, check_choice
from .denoising import head_loss
from .targets import LogMelTargets


class MaskedReconstruction(Objective):
    """Give back the log-mel frames where the encoder's input was masked.

    Learns frame-level content, as masked prediction of codes does, but spends part of itself on detail that codes leave
    out (level, pitch): good for speaker and for small amounts of data. The input is altered in three ways: spans of
    frames are masked (time), a band of mel bins is blanked over the whole clip (channel), and noise is added to the
    log-mel of some clips (magnitude). Encoders other than SpeechCLModel are altered in time only.

    Args:
        config: the encoder's configuration.
        masked_only: count masked frames only (Mockingjay), else all frames (TERA).
        max_band: widest band of mel bins that is blanked; the width is drawn from 0 to this (a fifth of the bins).
        noise_prob: share of clips to whose log-mel noise is added (0.15).
        noise_std: standard deviation of it, on log-mel of standard deviation about 1 (the root of 0.2).
        norm: "l1" (both papers) or "l2" error.
        num_mel_bins: mel filters of the target frames, which are normalised within the clip.

    Source: Liu et al. 2020 (Mockingjay), arXiv 1910.12638; Liu et al. 2021 (TERA), arXiv 2007.06028. Differs from them
    in that a masked frame is always replaced by the learned mask vector.
    """

    uses_mask = True
    remedy = "the targets cannot collapse: look for silent or constant audio, then lower learning_rate."

    def __init__(
        self,
        config,
        masked_only: bool = True,
        max_band: int = 16,
        noise_prob: float = 0.15,
        noise_std: float = 0.447,
        norm: str = "l1",
        num_mel_bins: int = 80,
    ):
        super().__init__()
        check_choice("masked_reconstruction.norm", norm, ("l1", "l2"))
        if max_band > getattr(config, "num_mel_bins", max_band):
            raise ValueError(
                f"masked_reconstruction.max_band must be at most the encoder's num_mel_bins, {config.num_mel_bins}, "
                f"found {max_band}"
            )
        self.masked_only, self.norm = masked_only, norm
        self.alteration = {"max_band": max_band, "log_mel_noise_prob": noise_prob, "log_mel_noise_std": noise_std}
        self.targets = LogMelTargets(config, num_mel_bins)
        self.head = nn.Linear(config.hidden_size, self.targets.dim)

    def collator_options(self):
        return self.alteration

    def count_items(self, batch):
        return super().count_items(batch) if self.masked_only else batch["frame_counts"].sum()

    def forward(self, encoder, batch):
        alteration = {name: batch[name] for name in ("mask_feature_indices", "log_mel_noise") if name in batch}
        outputs = encoder(
            batch["input_values"],
            attention_mask=batch.get("attention_mask"),
            mask_time_indices=batch["mask_time_indices"],
            **alteration,
        )
        return ObjectiveOutput(
            loss=head_loss(
                self.head, outputs.last_hidden_state, self.targets(batch, outputs), batch, self.masked_only, self.norm
            ),
            num_items=self.count_items(batch),
            metrics={},
        )
