"""Denoising autoencoder: corrupted waveform in, clean log-mel out."""

import torch
from torch import nn

from .base import Objective, ObjectiveOutput, check_choice, in_float32, own_frames, take_frames
from .targets import LogMelTargets


@in_float32
def reconstruction_loss(predictions: torch.Tensor, targets: torch.Tensor, norm: str) -> torch.Tensor:
    """Absolute ("l1") or squared ("l2") error, averaged over channels, summed over frames (M, C)."""
    error = predictions - targets
    return (error.abs() if norm == "l1" else error.square()).mean(-1).sum()


def head_loss(
    head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    batch: dict[str, torch.Tensor],
    masked_only: bool,
    norm: str,
) -> torch.Tensor:
    """Loss of what `head` makes of hidden states (B, T, H) against targets (B, T, C), at masked or at all frames."""
    if masked_only:
        hidden_states, targets = (take_frames(frames, batch["masked_positions"]) for frames in (hidden_states, targets))
        return reconstruction_loss(head(hidden_states), targets, norm)
    return reconstruction_loss(own_frames(head(hidden_states), batch), own_frames(targets, batch), norm)


class Denoising(Objective):
    """Give back the clean log-mel frames of a clip that was corrupted.

    Learns features that do not change with noise, room and other voices, and the shape of the spectrum: frame level,
    for speech recognition; with an hour of one voice, one seed, it could not be told from predicted codes (README,
    "Does pre-training pay?"). The corruptions are the training option `corruptions`; every objective of the run then
    gets the corrupted input.

    Args:
        config: the encoder's configuration.
        masked_only: mask spans of the input as well, and count the masked frames only.
        norm: "l1" or "l2" error.
        num_mel_bins: mel filters of the target frames, which are normalised within the clip.

    Source: Vincent et al. 2008, "Extracting and composing robust features with denoising autoencoders"; on speech with
    several corruptions Ravanelli et al. 2020 (PASE+), arXiv 2001.09239.
    """

    remedy = "the targets cannot collapse: look for silent or constant audio, then lower learning_rate."

    def __init__(self, config, masked_only: bool = False, norm: str = "l1", num_mel_bins: int = 80):
        super().__init__()
        check_choice("denoising.norm", norm, ("l1", "l2"))
        self.uses_mask, self.norm = masked_only, norm
        self.targets = LogMelTargets(config, num_mel_bins)
        self.head = nn.Linear(config.hidden_size, self.targets.dim)

    def collator_options(self):
        return {"corrupt_input": True}

    def count_items(self, batch):
        return super().count_items(batch) if self.uses_mask else batch["frame_counts"].sum()

    def forward(self, encoder, batch):
        outputs = encoder(
            batch["input_values"],
            attention_mask=batch.get("attention_mask"),
            mask_time_indices=batch["mask_time_indices"] if self.uses_mask else None,
        )
        return ObjectiveOutput(
            loss=head_loss(
                self.head, outputs.last_hidden_state, self.targets(batch, outputs), batch, self.uses_mask, self.norm
            ),
            num_items=self.count_items(batch),
            metrics={},
        )
