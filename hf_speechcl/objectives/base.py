"""The contract that every pre-training objective keeps."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..modeling_speechcl import length_mask


@dataclass
class ObjectiveOutput:
    """What an objective makes of one batch. Everything is a sum, so that batches, micro-batches and ranks just add up.

    Attributes:
        loss: scalar, the loss summed (never averaged) over items, with gradient.
        num_items: scalar, the number of items in the sum.
        metrics: `{name: sums}`, detached tensors of any fixed shape; `Objective.summarize` turns them into scalars.
        states: `{stage: (M, D)}`, detached vectors that must not become all alike; the collapse guard watches them.
    """

    loss: torch.Tensor
    num_items: torch.Tensor
    metrics: dict[str, torch.Tensor]
    states: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """A pre-training objective: a loss on what an encoder makes of a batch.

    The encoder is called as transformers' wav2vec 2.0 family is, `encoder(input_values, attention_mask=…,
    mask_time_indices=…)`, and gives `last_hidden_state` (B, T, H) and `extract_features` (B, T, C). To add an
    objective, write a subclass in a file of its own and name it in `OBJECTIVES`.

    Class attributes:
        uses_mask: the encoder is given `mask_time_indices`, so that its mask vector is trained.
        learns_codes: its codes may collapse; the collapse guard watches their perplexity.
        remedy: one sentence for the collapse guard: what to change if this objective collapses.

    A constructor takes `(config, **options)`, all options with defaults: the config is the encoder's, any of the
    wav2vec 2.0 family (`hidden_size`, `inputs_to_logits_ratio`, and `conv_dim` for the width of `extract_features`).
    Linear layers and norms are initialised by the model; a module with parameters or buffers of another kind has a
    method `init_weights` that fills them by `transformers.initialization`.
    """

    uses_mask = False
    learns_codes = False
    remedy = "lower learning_rate, raise warmup_steps."

    def forward(self, encoder, batch: dict[str, torch.Tensor]) -> ObjectiveOutput:
        raise NotImplementedError

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """`num_items` of the batch, known before the forward pass; masked frames, if a subclass has no other."""
        return batch["mask_time_indices"].sum()

    def collator_options(self) -> dict[str, int | float]:
        """Fields of `PretrainingCollator` that must have at least these values for the batches to serve."""
        return {}

    def summarize(self, metrics: dict[str, torch.Tensor], num_items: float) -> dict[str, float]:
        """Scalars to log from sums of `metrics` over `num_items` items."""
        return {name: value.item() / max(num_items, 1) for name, value in metrics.items()}

    def set_progress(self, progress: float) -> None:
        """Told before every update which share of the run is done, from 0 to 1, for schedules."""

    def after_update(self, encoder) -> None:
        """Called after every update of the weights."""


def features_dim(config) -> int:
    """Channels of `extract_features` for an encoder config of the wav2vec 2.0 family."""
    return config.conv_dim if isinstance(config.conv_dim, int) else config.conv_dim[-1]


def frame_lengths(encoder, batch: dict[str, torch.Tensor], num_frames: int) -> torch.Tensor:
    """(B,) frames of every clip of a batch of `input_values` that the encoder gave `num_frames` frames each."""
    input_values, attention_mask = batch["input_values"], batch.get("attention_mask")
    if attention_mask is None:
        return torch.full((len(input_values),), num_frames, device=input_values.device)
    return encoder._get_feat_extract_output_lengths(attention_mask.sum(-1))


def take_frames(frames: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The frames at `positions` (M,) of a batch, counted over all its clips: (B, T, ...) → (M, ...)."""
    return frames.flatten(0, 1).index_select(0, positions)


def own_frames(frames: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """All frames of a batch, zero where they are padding: (B, T, C) → (B * T, C)."""
    return (frames * length_mask(batch["frame_counts"], frames.shape[1])[..., None]).flatten(0, 1)


def first_is_best(logits: torch.Tensor) -> torch.Tensor:
    """Whether the first of each row (M, N) is the largest, as 1 or 0 (M,); if k are, as 1 / k, so that rows of equal
    logits are at chance."""
    is_best = logits == logits.amax(-1, keepdim=True)
    return is_best[:, 0] / is_best.sum(-1)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an option that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, found {value!r}")


def in_float32(function: Callable) -> Callable:
    """Decorator for losses: floating-point arguments, in lists too, become float32, and autocast is off inside."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        def cast(value):
            if isinstance(value, list):
                return [cast(part) for part in value]
            return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return wrapped
