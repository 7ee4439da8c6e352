"""InfoNCE on two views of an utterance (SimCLR's NT-Xent): the contrastive framework."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .base import ObjectiveOutput, first_is_best, in_float32
from .utterance import UtteranceObjective

LOWEST_TEMPERATURE = 0.01  # that is learnt


@in_float32
def nt_xent_logits(embeddings: torch.Tensor, labels: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Cosine similarities over temperature of every view with its other view, first, and with all views of others.

    Args:
        embeddings: (N, 2, D), two views of each clip.
        labels: (N,); a clip of the same label is no negative.
        temperature: scalar.

    Returns:
        (2N, 1 + 2N); -inf where there is no negative.

    Source: Chen et al. 2020, arXiv 2002.05709, eq. 1, symmetric in the views.
    """
    views = nn.functional.normalize(embeddings, dim=-1).transpose(0, 1).flatten(0, 1)  # (N, 2, D) -> (2N, D)
    similarity = views @ views.T / temperature
    same = (labels[:, None] == labels).repeat(2, 2)
    positives = similarity.diagonal(len(labels)).repeat(2)
    return torch.cat((positives[:, None], similarity.masked_fill(same, float("-inf"))), dim=1)


class InfoNCE(UtteranceObjective):
    """Tell the other view of the same utterance from views of all other utterances (NT-Xent, symmetric).

    Learns what two crops of one recording share, whatever noise, room and gain were added: speaker, channel, language,
    and with short crops words. For utterance-level tasks; frame-level content (speech recognition) is better learned
    by the masked objectives. Compares all clips of an update, over micro-batches and ranks: more clips, harder task.

    Args:
        config: the encoder's configuration.
        temperature: τ (0.1; Chen et al. find 0.1 to 0.5 good).
        learned_temperature: train τ from there on, as exp of a parameter, not below 0.01 (Radford et al. 2021, arXiv
            2103.00020, section 2.5).
        pooling, proj_dim, proj_layers, batch_norm: from frames to an embedding, see `UtteranceObjective`.

    Source: Chen et al. 2020, arXiv 2002.05709; van den Oord et al. 2018, arXiv 1807.03748, eq. 4.
    """

    remedy = "set info_nce.temperature to 0.05 to 0.5, lower learning_rate, use stronger view_augmentations."

    def __init__(
        self,
        config,
        temperature: float = 0.1,
        learned_temperature: bool = False,
        pooling: str = "statistics",
        proj_dim: int = 128,
        proj_layers: int = 2,
        batch_norm: bool = True,
    ):
        super().__init__(config, 2, pooling, proj_dim, proj_layers, batch_norm)
        self.initial_temperature = temperature
        self.log_temperature = nn.Parameter(torch.empty(())) if learned_temperature else None

    @property
    def temperature(self) -> torch.Tensor:
        if self.log_temperature is None:
            return torch.tensor(self.initial_temperature)
        return self.log_temperature.exp()

    @torch.no_grad()
    def after_update(self, encoder):
        if self.log_temperature is not None:
            self.log_temperature.clamp_(min=math.log(LOWEST_TEMPERATURE))

    def init_weights(self):
        if self.log_temperature is not None:
            init.constant_(self.log_temperature, math.log(self.initial_temperature))

    def contrast(self, embeddings, labels, keys):
        temperature = self.temperature
        logits = nt_xent_logits(embeddings, labels, temperature)
        with torch.no_grad():
            metrics = {
                "accuracy": first_is_best(logits).sum(),
                "chance": (1 / logits.isfinite().sum(-1)).sum(),
                "temperature": temperature.to(logits.device) * len(logits),
            }
        return ObjectiveOutput(
            loss=-logits.log_softmax(-1)[:, 0].sum(),
            num_items=torch.tensor(len(logits), device=logits.device),
            metrics=metrics,
        )
