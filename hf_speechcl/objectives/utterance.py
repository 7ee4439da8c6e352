"""What the objectives have in common that compare whole clips with each other."""

import torch
from torch import nn

from ..modeling_speechcl import length_mask
from .base import Objective, ObjectiveOutput, check_choice, frame_lengths


class UtteranceObjective(Objective):
    """An objective on one vector per view of a clip: encoder → pooling over time → projector → comparison.

    It is run in two steps, since what it compares are all clips of an update, whatever micro-batches and ranks these
    are spread over: `embed` works on one batch; `compare` on the embeddings of all batches, with their rows joined.

    The batch holds `view_values` (B * V, S), the V views of clip b in rows b * V to b * V + V - 1, their
    `view_attention_mask`, and for every clip `clip_labels` (B,), equal for clips of one class (without a label column
    each clip is a class of its own), and `clip_keys` (B,), random numbers that give an order.

    Args:
        config: the encoder's configuration.
        num_views: views of each clip that are compared.
        pooling: over time: "statistics" (mean and standard deviation) or "mean".
        proj_dim: channels of an embedding.
        proj_layers: linear layers of the projector, with GELU between, hidden_size wide inside.
        batch_norm: bring every channel of the projection to mean 0 and variance 1 over all clips of the update (over
            the run in evaluation). A new encoder gives almost the same vector for everything, and then nothing is
            learned for long; this takes away what all clips have in common.
    """

    def __init__(self, config, num_views: int, pooling: str, proj_dim: int, proj_layers: int, batch_norm: bool):
        super().__init__()
        check_choice("pooling", pooling, ("statistics", "mean"))
        self.num_views, self.pooling = num_views, pooling
        self.views_per_class = 1  # that it must have to take part; 0 where classes are not compared
        width = (2 if pooling == "statistics" else 1) * config.hidden_size
        layers: list[nn.Module] = []
        for _ in range(proj_layers - 1):
            layers += [nn.Linear(width, config.hidden_size), nn.GELU()]
            width = config.hidden_size
        self.projector = nn.Sequential(*layers, nn.Linear(width, proj_dim, bias=not batch_norm))
        self.batch_norm = nn.BatchNorm1d(proj_dim, affine=False) if batch_norm else nn.Identity()

    def collator_options(self):
        return {"num_views": self.num_views}

    def project(self, frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Frames (B, T, H), of which `lengths` (B,) are a clip's own → float32 (B, proj_dim), before the batch norm."""
        pooled = pool_statistics(frames, lengths)
        return self.projector(pooled[:, : frames.shape[-1]] if self.pooling == "mean" else pooled).float()

    def embed(self, encoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`embeddings` (B, num_views, proj_dim), `labels` (B,) and `keys` (B,)."""
        labels = batch["clip_labels"]
        views = {"input_values": batch["view_values"], "attention_mask": batch.get("view_attention_mask")}
        hidden_states = encoder(views["input_values"], attention_mask=views["attention_mask"]).last_hidden_state
        rows = self.project(hidden_states, frame_lengths(encoder, views, hidden_states.shape[1]))
        if len(labels):
            embeddings = rows.view(len(labels), -1, rows.shape[-1])[:, : self.num_views]  # (B * V, D) -> (B, V, D)
        else:  # all clips were skipped: one row of silence stands in, which counts for nothing
            embeddings = rows[:0].view(0, self.num_views, rows.shape[-1])
        return {"embeddings": embeddings, "labels": labels, "keys": batch["clip_keys"]}

    def compare(self, embedded: dict[str, torch.Tensor]) -> ObjectiveOutput:
        """Loss of the clips that `embed` made vectors of, compared with each other in float32."""
        embeddings = embedded["embeddings"]
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.shape[:2].numel() > (1 if self.training else 0):  # one vector has no variance
                embeddings = self.batch_norm(embeddings.flatten(0, 1)).view_as(embeddings)
            output = self.contrast(embeddings, embedded["labels"], embedded["keys"])
        output.states["embeddings"] = embeddings.detach().flatten(0, 1)
        return output

    def contrast(self, embeddings: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor) -> ObjectiveOutput:
        """Loss of (N, V, D), the views of N clips, with their labels (N,) and keys (N,); subclasses have it."""
        raise NotImplementedError

    def forward(self, encoder, batch):
        return self.compare(self.embed(encoder, batch))

    def count_items(self, batch):
        raise TypeError("how many items clips make is known only when all clips of an update are compared")


def pool_statistics(frames: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation of (B, T, H) over each clip's own frames: (B, 2H).

    Source: Snyder et al. 2018, "X-vectors: robust DNN embeddings for speaker recognition", section 2.
    """
    mask, count = length_mask(lengths, frames.shape[1])[..., None], lengths[:, None].clamp_min(1)
    frames = frames.float()
    mean = (frames * mask).sum(1) / count
    variance = ((frames - mean[:, None]).square() * mask).sum(1) / count
    return torch.cat((mean, (variance + 1e-5).sqrt()), dim=-1)


def as_rows(embeddings: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All views as rows, (N, V, D) -> (N * V, D), and the label of each (N * V,)."""
    return embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])


def distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (M, N) between rows (M, D) and (N, D), exact near 0; equal rows have a gradient of 0."""
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")
