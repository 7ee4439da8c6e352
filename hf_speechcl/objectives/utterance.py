"""What the objectives have in common that compare whole clips with each other."""

import torch
from torch import nn

from ..modeling_speechcl import length_mask
from .base import Objective, ObjectiveOutput, frame_lengths


class UtteranceObjective(Objective):
    """An objective on one vector per view of a clip: encoder → mean over time → projector → comparison.

    It is run in two steps, since what it compares are all clips of an update, whatever micro-batches and ranks these
    are spread over: `embed` works on one batch; `compare` on the embeddings of all batches, with their rows joined.

    The batch holds `view_values` (B * V, S), the V views of clip b in rows b * V to b * V + V - 1, their
    `view_attention_mask`, and for every clip `clip_labels` (B,), equal for clips of one class (without a label column
    each clip is a class of its own), and `clip_keys` (B,), random numbers that give an order.

    Args:
        config: the encoder's configuration.
        num_views: views of each clip that are compared.
        proj_dim: channels of an embedding.
        proj_layers: linear layers of the projector, with GELU between, hidden_size wide inside.
    """

    def __init__(self, config, num_views: int, proj_dim: int, proj_layers: int):
        super().__init__()
        self.num_views = num_views
        layers: list[nn.Module] = []
        for _ in range(proj_layers - 1):
            layers += [nn.Linear(config.hidden_size, config.hidden_size), nn.GELU()]
        self.projector = nn.Sequential(*layers, nn.Linear(config.hidden_size, proj_dim))

    def collator_options(self):
        return {"num_views": self.num_views}

    def embed(self, encoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`embeddings` (B, num_views, proj_dim), `labels` (B,) and `keys` (B,); a subclass may add to them."""
        labels = batch["clip_labels"]
        views = {"input_values": batch["view_values"], "attention_mask": batch.get("view_attention_mask")}
        hidden_states = encoder(views["input_values"], attention_mask=views["attention_mask"]).last_hidden_state
        pooled = mean_over_time(hidden_states, frame_lengths(encoder, views, hidden_states.shape[1]))
        rows = self.projector(pooled).float()
        if len(labels):
            embeddings = rows.view(len(labels), -1, rows.shape[-1])[:, : self.num_views]  # (B * V, D) -> (B, V, D)
        else:  # all clips were skipped: one row of silence stands in, which counts for nothing
            embeddings = rows[:0].view(0, self.num_views, rows.shape[-1])
        return {"embeddings": embeddings, "labels": labels, "keys": batch["clip_keys"]}

    def compare(self, embedded: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """Loss of the clips that `embed` made vectors of, compared with each other in float32."""
        with torch.autocast(embedded["embeddings"].device.type, enabled=False):
            output = self.contrast(embedded)
        output.states["embeddings"] = embedded["embeddings"].detach().flatten(0, 1)
        return output

    def contrast(self, embedded: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """As `compare`; subclasses have it."""
        raise NotImplementedError

    def forward(self, encoder, batch):
        return self.compare(self.embed(encoder, batch))

    def count_items(self, batch):
        raise TypeError("how many items clips make is known only when all clips of an update are compared")


def mean_over_time(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean of (B, T, H) over each clip's own frames: (B, H)."""
    mask = length_mask(lengths, frames.shape[1])[..., None]
    return (frames * mask).sum(1) / lengths[:, None].clamp_min(1)


def rows_and_labels(embedded: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """All views as rows (N * V, D), and the label of each (N * V,)."""
    embeddings = embedded["embeddings"]
    return embeddings.flatten(0, 1), embedded["labels"].repeat_interleave(embeddings.shape[1])


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (M, N) between rows (M, D) and (N, D), exact near 0; equal rows have a gradient of 0."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
