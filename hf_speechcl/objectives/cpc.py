"""Contrastive predictive coding: a causal context tells the frames to come from other frames of the clip."""

import torch
from torch import nn

from .base import Objective, ObjectiveOutput, features_dim, first_is_best, in_float32


@in_float32
def cpc_logits(predictions: torch.Tensor, features: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor):
    """Scores of the true frame, first, and of its negatives, by the scalar product with the prediction.

    Args:
        predictions: (M, C).
        features: (F, C) frames of all clips.
        targets: (M,) rows of the true frames; negatives: (M, K) rows of the others.

    Returns:
        (M, 1 + K).

    Source: van den Oord et al. 2018, arXiv 1807.03748, eq. 3 and 4.
    """
    candidates = features[torch.cat((targets[:, None], negatives), dim=1)]  # (M, 1 + K, C)
    return torch.einsum("mc,mkc->mk", predictions, candidates)


class CPC(Objective):
    """Predict, from a context that sees the past only, which of several frames comes k steps later.

    Learns slow features of speech: phones and speaker. The encoder is run with causal attention, so the context of
    frame t knows no waveform beyond what frame t itself covers (`SpeechCLModel.forward`, `causal`); the frames that it
    predicts are `extract_features`, of the clean clip where the input is corrupted. Negatives are other frames of the
    same clip, so knowing the speaker does not help. Only encoders that can be run causally will do: SpeechCLModel.

    Args:
        config: the encoder's configuration.
        num_steps: steps K ahead, each with a matrix W_k of its own. 12 in the paper, of 10 ms; 4 frames of 40 ms reach
            a little further. The windows of neighbouring frames overlap, as in the paper: with the default encoder by
            45 of 85 ms at the first step and 5 ms at the second, so that the first steps are partly known.
        num_negatives: frames of the same clip that each true frame is told from (10).

    Source: van den Oord et al. 2018, arXiv 1807.03748. Differs from it in the context network: a causal Transformer
    for a GRU, so that the whole encoder is trained. Corrupted input costs another pass, over the clean clip.
    """

    remedy = "lower learning_rate, raise cpc.num_negatives."

    def __init__(self, config, num_steps: int = 4, num_negatives: int = 10):
        super().__init__()
        self.num_steps, self.num_negatives = num_steps, num_negatives
        dim = features_dim(config)
        self.predictors = nn.ModuleList(nn.Linear(config.hidden_size, dim, bias=False) for _ in range(num_steps))

    def collator_options(self):
        return {"num_frame_negatives": self.num_negatives}

    def count_items(self, batch):
        lengths = batch["frame_counts"]
        return sum((lengths - step).clamp_min(0).sum() for step in range(1, self.num_steps + 1))

    def forward(self, encoder, batch):
        if not hasattr(encoder, "causal_reach"):
            raise TypeError(
                f"cpc needs an encoder that can be run causally, as SpeechCLModel; found {type(encoder).__name__}"
            )
        outputs = encoder(batch["input_values"], attention_mask=batch.get("attention_mask"), causal=True)
        clean = outputs
        if "clean_values" in batch:
            clean = encoder(batch["clean_values"], attention_mask=batch.get("attention_mask"))
        times = torch.arange(outputs.last_hidden_state.shape[1], device=batch["frame_counts"].device)
        own = times < batch["frame_counts"][:, None]
        # The clips' own frames, one clip after the other: (B, T, C) -> (F, C)
        contexts, features = outputs.last_hidden_state[own], clean.extract_features[own]
        left = (batch["frame_counts"][:, None] - times)[own]  # frames from this one to the end of its clip
        negatives = batch["frame_negative_indices"][:, : self.num_negatives]

        losses, correct, counts = [], [], []
        for step, predictor in enumerate(self.predictors, start=1):
            now = (left > step).nonzero()[:, 0]
            logits = cpc_logits(predictor(contexts[now]), features, now + step, negatives[now + step])
            losses.append(-logits.log_softmax(-1)[:, 0].sum())
            correct.append(first_is_best(logits.detach()).sum())
            counts.append(torch.tensor(len(now), device=now.device))
        counts = torch.stack(counts)
        return ObjectiveOutput(
            loss=sum(losses),
            num_items=counts.sum(),
            metrics={"correct": torch.stack(correct), "counts": counts},
        )

    def summarize(self, metrics, num_items):
        counts = metrics["counts"].clamp_min(1)
        steps = {f"accuracy_step_{step}": share.item() for step, share in enumerate(metrics["correct"] / counts, 1)}
        accuracy = (metrics["correct"].sum() / counts.sum()).item()
        return {"accuracy": accuracy, "chance": 1 / (1 + self.num_negatives), **steps}
