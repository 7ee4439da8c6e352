"""The contract that every pre-training objective keeps."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class ObjectiveOutput:
    """What an objective makes of one batch. Everything is a sum, so that batches, micro-batches and ranks just add up.

    Attributes:
        loss: scalar, the loss summed (never averaged) over items, with gradient.
        num_items: scalar, the number of items in the sum.
        metrics: `{name: sums}`, detached tensors of any fixed shape; `Objective.summarize` turns them into scalars.
    """

    loss: torch.Tensor
    num_items: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Objective(nn.Module):
    """A pre-training objective: a loss on what an encoder makes of a batch.

    The encoder is called as transformers' wav2vec 2.0 family is, `encoder(input_values, attention_mask=…,
    mask_time_indices=…)`, and gives `last_hidden_state` (B, T, H) and `extract_features` (B, T, C). To add an
    objective, write a subclass in a file of its own and name it in `OBJECTIVES`.

    Class attributes:
        masked_frames: the collator draws `mask_time_indices` for it.
        num_negatives: how many negatives per masked frame the collator draws for it; may be set by the instance.

    A constructor takes `(config, **options)`, all options with defaults: the config is the encoder's, any of the
    wav2vec 2.0 family (`hidden_size`, `inputs_to_logits_ratio`, and `conv_dim` for the width of `extract_features`).
    Linear layers and norms are initialised by the model; a module with parameters or buffers of another kind has a
    method `init_weights` that fills them by `transformers.initialization`.
    """

    masked_frames = False
    num_negatives = 0

    def forward(self, encoder, batch: dict[str, torch.Tensor]) -> ObjectiveOutput:
        raise NotImplementedError

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`num_items` of the batch, known before the forward pass."""
        raise NotImplementedError

    def summarize(self, metrics: dict[str, torch.Tensor], num_items: float) -> dict[str, float]:
        """Scalars to log from sums of `metrics` over `num_items` items."""
        return {name: value.item() / max(num_items, 1) for name, value in metrics.items()}

    def set_progress(self, progress: float) -> None:
        """Told before every update which share of the run is done, from 0 to 1, for schedules."""


def features_dim(config) -> int:
    """Channels of `extract_features` for an encoder config of the wav2vec 2.0 family."""
    return config.conv_dim if isinstance(config.conv_dim, int) else config.conv_dim[-1]
