"""Targets of masked prediction and reconstruction: log-mel frames at the encoder's rate, normalised within a clip."""

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..configuration_speechcl import SpeechCLConfig
from ..modeling_speechcl import SpeechCLLogMel, length_mask

LOG_MEL_FIELDS = (
    "model_type sampling_rate num_mel_bins frame_length hop_length log_mel_floor log_mel_mean log_mel_std".split()
)


def normalize_over_time(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over time for every clip and channel; 0 beyond a clip's own frames.

    Args:
        frames: (B, T, C).
        lengths: (B,) frames of every clip.
    """
    mask = length_mask(lengths, frames.shape[1])[..., None]
    count = lengths[:, None, None].clamp_min(1)
    mean = (frames * mask).sum(1, keepdim=True) / count
    variance = ((frames - mean).square() * mask).sum(1, keepdim=True) / count
    return (frames - mean) * (variance + 1e-5).rsqrt() * mask


def stack_frames(log_mel: torch.Tensor, num_frames: int, stack: int) -> torch.Tensor:
    """(B, F, M) → (B, T, k * M): k log-mel frames side by side for each of the T encoder frames, zeros where F ends."""
    padded = nn.functional.pad(log_mel, (0, 0, 0, stack * num_frames - log_mel.shape[1]))
    return padded.reshape(len(log_mel), num_frames, -1)  # (B, T * k, M) -> (B, T, k * M)


class LogMelTargets(nn.Module):
    """Log-mel frames of 10 ms, normalised within the clip and stacked to the encoder's frames.

    Args:
        config: the encoder's; its frames must last a multiple of 10 ms.
        num_mel_bins: mel filters.

    Attributes:
        dim: channels of a target, num_mel_bins times the log-mel frames of an encoder frame.
    """

    def __init__(self, config, num_mel_bins: int):
        super().__init__()
        sampling_rate = getattr(config, "sampling_rate", 16000)
        hop = sampling_rate // 100
        if config.inputs_to_logits_ratio % hop:
            raise ValueError(
                f"targets are log-mel frames of {hop} samples: an encoder frame must be a multiple of it, found "
                f"{config.inputs_to_logits_ratio} samples"
            )
        log_mel_config = SpeechCLConfig(
            sampling_rate=sampling_rate, hop_length=hop, frame_length=5 * hop // 2, num_mel_bins=num_mel_bins
        )
        self.log_mel = SpeechCLLogMel(log_mel_config)
        self.is_encoders = all(getattr(config, name, None) == getattr(log_mel_config, name) for name in LOG_MEL_FIELDS)
        # Other encoders give a frame less than the waveform has room for.
        self.pads_ends = config.model_type == "speechcl"
        self.mel_per_frame = config.inputs_to_logits_ratio // hop
        self.dim = self.mel_per_frame * num_mel_bins

    def forward(self, batch: dict[str, torch.Tensor], outputs: ModelOutput) -> torch.Tensor:
        """Targets (B, T, dim) of a batch from its `clean_values` where it has these, and what was made of it."""
        num_frames, attention_mask = outputs.last_hidden_state.shape[1], batch.get("attention_mask")
        if self.is_encoders and "clean_values" not in batch:
            log_mel = outputs.log_mel
        else:
            log_mel = self.log_mel(batch.get("clean_values", batch["input_values"]))
        if not self.pads_ends:
            log_mel = log_mel[:, : num_frames * self.mel_per_frame]
        if attention_mask is None:
            lengths = torch.full((len(log_mel),), log_mel.shape[1], device=log_mel.device)
        else:
            hop = self.log_mel.config.hop_length
            lengths = (-(-attention_mask.sum(-1) // hop)).clamp_max(log_mel.shape[1])
            if not self.pads_ends:  # in a batch as alone, where the end is cut off
                lengths = lengths.minimum(batch["frame_counts"] * self.mel_per_frame)
        return stack_frames(normalize_over_time(log_mel, lengths), num_frames, self.mel_per_frame)
