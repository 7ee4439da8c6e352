"""BEST-RQ: masked prediction of random-projection codes."""

import torch
from torch import nn

from ..configuration_speechcl import SpeechCLConfig
from ..modeling_speechcl import SpeechCLLogMel
from ..quantizers import RandomProjectionQuantizer, code_histogram, perplexity
from .base import Objective, ObjectiveOutput


def masked_prediction_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over frames and averaged over codebooks.

    Args:
        logits: (M, G, V) scores of V codes in G codebooks at M masked frames.
        codes: (M, G) the codes to predict.
    """
    # (M, G, V) -> (M * G, V)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), codes.flatten(), reduction="sum") / codes.shape[1]


def stack_frames(log_mel: torch.Tensor, num_frames: int, lengths: torch.Tensor) -> torch.Tensor:
    """Normalise log-mel frames over time within each clip, and stack them to the encoder's frame rate.

    Args:
        log_mel: (B, F, M); frames beyond a clip's own are padding.
        num_frames: encoder frames T.
        lengths: (B,) log-mel frames of every clip.

    Returns:
        (B, T, k * M) with k = ceil(F / T): mean 0, variance 1 per clip and mel bin over its own frames, 0 beyond.
    """
    mask = (torch.arange(log_mel.shape[1], device=log_mel.device) < lengths[:, None])[..., None]
    count = lengths[:, None, None].clamp_min(1)
    mean = (log_mel * mask).sum(1, keepdim=True) / count
    variance = ((log_mel - mean).square() * mask).sum(1, keepdim=True) / count
    normalized = (log_mel - mean) * (variance + 1e-5).rsqrt() * mask
    stack = -(-log_mel.shape[1] // num_frames)
    padded = nn.functional.pad(normalized, (0, 0, 0, stack * num_frames - log_mel.shape[1]))
    return padded.reshape(len(log_mel), num_frames, -1)  # (B, T * k, M) -> (B, T, k * M)


class BestRQ(Objective):
    """Predict, at masked frames, the codes that fixed random quantisers give to the log-mel frames there.

    Learns frame-level phonetic content, for speech recognition. Nothing can collapse, as the targets are not learned;
    no second model, no clustering: the simplest of the masked objectives.

    Args:
        config: the encoder's configuration.
        num_codebooks: independent quantisers, each with its own softmax (Zhang et al. 2023 use 16).
        codebook_size: codes in each (Chiu et al. 2022 use 8192; a smaller one suits hours rather than weeks of audio).
        codebook_dim: dimension of a codeword (16 in Chiu et al. 2022).
        num_mel_bins: mel filters of the target frames.
        seed: draws the quantisers.

    Source: Chiu et al. 2022, "Self-supervised learning with random-projection quantizer for speech recognition",
    arXiv 2202.01855. Differs from it in that the mask replaces encoder frames by a learned vector, not input frames
    by noise.
    """

    masked_frames = True

    def __init__(
        self,
        config,
        num_codebooks: int = 4,
        codebook_size: int = 512,
        codebook_dim: int = 16,
        num_mel_bins: int = 80,
        seed: int = 0,
    ):
        super().__init__()
        sampling_rate = getattr(config, "sampling_rate", 16000)
        hop = sampling_rate // 100
        self.log_mel = SpeechCLLogMel(
            SpeechCLConfig(
                sampling_rate=sampling_rate, hop_length=hop, frame_length=5 * hop // 2, num_mel_bins=num_mel_bins
            )
        )
        if config.inputs_to_logits_ratio % hop:
            raise ValueError(
                f"best_rq stacks log-mel frames of {hop} samples: an encoder frame must be a multiple of it, "
                f"found {config.inputs_to_logits_ratio} samples"
            )
        self.mel_per_frame = config.inputs_to_logits_ratio // hop
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.quantizer = RandomProjectionQuantizer(
            self.mel_per_frame * num_mel_bins, codebook_dim, codebook_size, num_codebooks, seed
        )
        self.head = nn.Linear(config.hidden_size, num_codebooks * codebook_size)

    def count_items(self, batch):
        return batch["mask_time_indices"].sum()

    def targets(self, batch: dict[str, torch.Tensor], num_frames: int) -> torch.Tensor:
        """Codes (M, G) of the masked frames."""
        input_values, attention_mask = batch["input_values"], batch.get("attention_mask")
        # An encoder without padding at its ends gives a frame less than the waveform has room for.
        log_mel = self.log_mel(input_values)[:, : num_frames * self.mel_per_frame]
        if attention_mask is None:
            lengths = torch.full((len(log_mel),), log_mel.shape[1], device=log_mel.device)
        else:
            hop = self.log_mel.config.hop_length
            lengths = (-(-attention_mask.sum(-1) // hop)).clamp_max(log_mel.shape[1])
        return self.quantizer(stack_frames(log_mel, num_frames, lengths)[batch["mask_time_indices"].bool()])

    def forward(self, encoder, batch):
        mask = batch["mask_time_indices"].bool()
        hidden_states = encoder(
            batch["input_values"], attention_mask=batch.get("attention_mask"), mask_time_indices=mask
        ).last_hidden_state
        codes = self.targets(batch, hidden_states.shape[1])
        # (B, T, H) -> (M, H) -> (M, G, V)
        logits = self.head(hidden_states[mask]).view(-1, self.num_codebooks, self.codebook_size)
        with torch.no_grad():
            correct = (logits.argmax(-1) == codes).float().mean(-1).sum()
        return ObjectiveOutput(
            loss=masked_prediction_loss(logits, codes),
            num_items=mask.sum(),
            metrics={"accuracy": correct, "codes": code_histogram(codes, self.codebook_size)},
        )

    def summarize(self, metrics, num_items):
        return {
            "accuracy": metrics["accuracy"].item() / max(num_items, 1),
            "code_perplexity": perplexity(metrics["codes"].float()).mean().item(),
        }
