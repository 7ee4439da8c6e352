"""data2vec: masked prediction of what a slowly moving copy of the encoder makes of the whole clip."""

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init

from ..modeling_speechcl import SpeechCLModel
from .base import Objective, ObjectiveOutput, frame_lengths, in_float32, take_frames
from .targets import normalize_over_time


@in_float32
def top_layers_target(hidden_states: list[torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
    """Mean of layer outputs (B, T, H), each normalised over the time of every clip: (B, T, H).

    Source: Baevski et al. 2022, arXiv 2202.03555, sections 3.3 and 4.2 (instance norm for speech).
    """
    return sum(normalize_over_time(states, lengths) for states in hidden_states) / len(hidden_states)


@in_float32
def regression_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error, averaged over channels, summed over frames (M, H)."""
    return (predictions - targets).square().mean(-1).sum()


class Data2Vec(Objective):
    """Predict, at masked frames, the mean of the top layers that a teacher gives for the unmasked clip.

    Learns contextual frame-level features, for speech recognition. The teacher is the exponential moving average of the
    encoder, moved after every update; it is part of the model's weights, so checkpoints resume it exactly.

    Args:
        config: the encoder's configuration.
        top_layers: layers K averaged for the target (8 of Base's 12; never more than there are).
        ema_decay_start, ema_decay_end: decay τ of the teacher, from the first to the last over ema_anneal (0.999 →
            0.9999). In runs of hundreds of updates take 0.99 or the teacher stays what it was drawn as.
        ema_anneal: share of the run over which the decay rises linearly (30,000 of 400,000 updates in the paper).

    Raises:
        ValueError: a decay above 1, or an encoder without layers.

    Source: Baevski et al. 2022, arXiv 2202.03555. Differs from it in taking whole layer outputs, of the last
    layer after the final norm, rather than those of the feed-forward blocks, and in a teacher of its own from the front
    end up, where the paper's shares all below the Transformer with the student.
    """

    uses_mask = True
    remedy = "lower learning_rate, raise data2vec.ema_decay_start, mask less: the teacher's vectors became alike."

    def __init__(
        self,
        config,
        top_layers: int = 8,
        ema_decay_start: float = 0.999,
        ema_decay_end: float = 0.9999,
        ema_anneal: float = 0.075,
    ):
        super().__init__()
        for name, decay in (("ema_decay_start", ema_decay_start), ("ema_decay_end", ema_decay_end)):
            if decay > 1:
                raise ValueError(f"data2vec.{name} must be at most 1, found {decay}")
        if config.num_hidden_layers < 1:
            raise ValueError("data2vec predicts what layers give: num_hidden_layers is 0")
        self.top_layers = min(top_layers, config.num_hidden_layers)
        self.ema_decay_start, self.ema_decay_end, self.ema_anneal = ema_decay_start, ema_decay_end, ema_anneal
        self.decay = ema_decay_start
        self.teacher = SpeechCLModel(config) if config.model_type == "speechcl" else AutoModel.from_config(config)
        self.teacher.requires_grad_(False)
        self.head = nn.Linear(config.hidden_size, config.hidden_size)
        self.register_buffer("begun", torch.empty((), dtype=torch.bool))
        self.knows_begun = False

    def init_weights(self):
        init.zeros_(self.begun)

    def train(self, mode: bool = True):
        super().train(mode)
        self.teacher.eval().requires_grad_(False)  # from_pretrained makes every weight trainable
        return self

    def begin(self, encoder) -> None:
        """Make the teacher a copy of the encoder, unless it was loaded with the weights."""
        if not self.knows_begun and not self.begun:
            self.teacher.load_state_dict(encoder.state_dict())
            self.begun.fill_(True)
        self.knows_begun = True

    def set_progress(self, progress):
        share = min(progress / self.ema_anneal, 1.0)
        self.decay = self.ema_decay_start + share * (self.ema_decay_end - self.ema_decay_start)

    @torch.no_grad()
    def after_update(self, encoder):
        for target, source in zip(self.teacher.parameters(), encoder.parameters()):
            target.lerp_(source.detach().to(target.dtype), 1 - self.decay)

    def forward(self, encoder, batch):
        self.begin(encoder)
        masked = batch["masked_positions"]
        attention_mask = batch.get("attention_mask")
        with torch.no_grad():
            teacher_states = self.teacher(
                batch.get("clean_values", batch["input_values"]),
                attention_mask=attention_mask,
                output_hidden_states=True,
            ).hidden_states[-self.top_layers :]
            lengths = frame_lengths(encoder, batch, teacher_states[0].shape[1])
            targets = take_frames(top_layers_target(list(teacher_states), lengths), masked)
        hidden_states = encoder(
            batch["input_values"], attention_mask=attention_mask, mask_time_indices=batch["mask_time_indices"]
        ).last_hidden_state
        num_items = self.count_items(batch)
        return ObjectiveOutput(
            loss=regression_loss(self.head(take_frames(hidden_states, masked)), targets),
            num_items=num_items,
            metrics={"ema_decay": num_items * self.decay},
            states={"teacher": sum(take_frames(states, masked).float() for states in teacher_states)},
        )
