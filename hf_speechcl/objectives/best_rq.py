"""BEST-RQ: masked prediction of random-projection codes."""

import torch
from torch import nn

from ..quantizers import RandomProjectionQuantizer, code_histogram, code_usage
from .base import Objective, ObjectiveOutput, in_float32, take_frames
from .targets import LogMelTargets


@in_float32
def masked_prediction_loss(logits: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over frames and averaged over codebooks.

    Args:
        logits: (M, G, V) scores of V codes in G codebooks at M masked frames.
        codes: (M, G) the codes to predict.
    """
    # (M, G, V) -> (M * G, V)
    return nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum") / codes.shape[1]


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

    uses_mask = True
    remedy = "the codes are fixed and cannot collapse: look for silent or constant audio, then lower learning_rate."

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
        self.targets = LogMelTargets(config, num_mel_bins)
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.quantizer = RandomProjectionQuantizer(self.targets.dim, codebook_dim, codebook_size, num_codebooks, seed)
        self.head = nn.Linear(config.hidden_size, num_codebooks * codebook_size)

    def forward(self, encoder, batch):
        masked = batch["masked_positions"]
        outputs = encoder(
            batch["input_values"],
            attention_mask=batch.get("attention_mask"),
            mask_time_indices=batch["mask_time_indices"],
        )
        codes = self.quantizer(take_frames(self.targets(batch, outputs), masked))
        # (B, T, H) -> (M, H) -> (M, G, V)
        logits = self.head(take_frames(outputs.last_hidden_state, masked)).view(
            -1, self.num_codebooks, self.codebook_size
        )
        with torch.no_grad():
            correct = (logits.argmax(-1) == codes).float().mean(-1).sum()
        return ObjectiveOutput(
            loss=masked_prediction_loss(logits, codes),
            num_items=self.count_items(batch),
            metrics={"accuracy": correct, "codes": code_histogram(codes, self.codebook_size)},
        )

    def summarize(self, metrics, num_items):
        return {
            "accuracy": metrics["accuracy"].item() / max(num_items, 1),
            **code_usage(metrics["codes"]),
        }
