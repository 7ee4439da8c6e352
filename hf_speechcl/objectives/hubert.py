"""HuBERT: masked prediction of k-means units."""

import torch
from torch import nn
from transformers import initialization as init

from ..quantizers import code_histogram, code_usage
from .base import Objective, ObjectiveOutput, in_float32, take_frames


@in_float32
def unit_logits(predictions: torch.Tensor, embeddings: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cosine similarities over temperature: projected frames (M, D) and unit embeddings (V, D) → (M, V) float32."""
    return nn.functional.normalize(predictions, dim=-1) @ nn.functional.normalize(embeddings, dim=-1).T / temperature


class UnitEmbeddings(nn.Module):
    """A learned vector for each unit: `weight` (num_units, dim)."""

    def __init__(self, num_units: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_units, dim))

    def init_weights(self):
        init.normal_(self.weight)


class HuBERT(Objective):
    """Predict, at masked frames, the k-means units of the audio there, made beforehand by scripts/make_units.py.

    Learns frame-level phonetic content, for speech recognition: the first time from units of MFCCs, then a new encoder
    from units of a layer of the first, which are closer to phones. Batches hold `units` (B, T) int64, -100 on padding.
    `code_perplexity` is that of the units at masked frames, which are not learned and cannot collapse.

    Args:
        config: the encoder's configuration.
        num_units: clusters.
        units_hash: which units these are, as a record; see `hf_speechcl.data.units.Units.hash`.
        samples_per_unit: samples that a unit stands for; must be those of an encoder frame.
        proj_dim: channels in which frames and units are compared (256 for Base).
        temperature: of the cosine similarities, τ (0.1).

    Source: Hsu et al. 2021, "HuBERT: Self-supervised speech representation learning by masked prediction of hidden
    units", arXiv 2106.07447, eq. 3 and the loss over masked frames alone (α = 1), which it found best. Differs from its
    code in that the unit embeddings begin normal rather than uniform on [0, 1], where all point nearly the same way:
    after 200 updates on 3.6 hours the validation loss was 3.59 against 3.93.
    """

    uses_mask = True
    remedy = (
        "the units are fixed and cannot collapse: look at their perplexity in units.json, then lower learning_rate."
    )

    def __init__(
        self,
        config,
        num_units: int = 100,
        units_hash: str = "",
        samples_per_unit: int = 640,
        proj_dim: int = 256,
        temperature: float = 0.1,
    ):
        super().__init__()
        if config.inputs_to_logits_ratio != samples_per_unit:
            raise ValueError(
                f"hubert needs a unit for each encoder frame: the encoder has a frame each "
                f"{config.inputs_to_logits_ratio} samples, the units are one each {samples_per_unit}"
            )
        self.num_units, self.units_hash, self.temperature = num_units, units_hash, temperature
        self.project = nn.Linear(config.hidden_size, proj_dim)
        self.embeddings = UnitEmbeddings(num_units, proj_dim)

    def forward(self, encoder, batch):
        masked = batch["masked_positions"]
        hidden_states = encoder(
            batch["input_values"],
            attention_mask=batch.get("attention_mask"),
            mask_time_indices=batch["mask_time_indices"],
        ).last_hidden_state
        units = take_frames(batch["units"], masked)
        # (B, T, H) -> (M, H) -> (M, V)
        logits = unit_logits(self.project(take_frames(hidden_states, masked)), self.embeddings.weight, self.temperature)
        with torch.no_grad():
            correct = (logits.argmax(-1) == units).float().sum()
        return ObjectiveOutput(
            loss=nn.functional.cross_entropy(logits, units, reduction="sum"),
            num_items=self.count_items(batch),
            metrics={"accuracy": correct, "codes": code_histogram(units[:, None], self.num_units)},
        )

    def summarize(self, metrics, num_items):
        return {
            "accuracy": metrics["accuracy"].item() / max(num_items, 1),
            **code_usage(metrics["codes"]),
        }
