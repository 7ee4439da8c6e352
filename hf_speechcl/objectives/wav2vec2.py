"""wav2vec 2.0: masked contrastive prediction of quantised features."""

import torch
from torch import nn

from ..quantizers import GumbelVectorQuantizer, code_histogram, code_usage
from .base import Objective, ObjectiveOutput, features_dim, first_is_best, in_float32, take_frames


@in_float32
def contrastive_logits(
    predictions: torch.Tensor, targets: torch.Tensor, codes: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cosine similarities over temperature, the true target first.

    Args:
        predictions, targets: (M, D) at the masked frames.
        codes: (M, G) that the targets were made from.
        negatives: (M, K) rows of `targets` that serve as distractors.

    Returns:
        (M, 1 + K). A distractor with the codes of the true target is left out (-inf): it would punish the right answer.
    """
    similarity = nn.functional.normalize(predictions, dim=-1) @ nn.functional.normalize(targets, dim=-1).T
    # (M, M) -> (M, K)
    distractors = similarity.gather(1, negatives) / temperature
    distractors = distractors.masked_fill((codes[negatives] == codes[:, None]).all(-1), float("-inf"))
    return torch.cat((similarity.diagonal()[:, None] / temperature, distractors), dim=1)


@in_float32
def diversity_loss(probabilities: torch.Tensor, clips: torch.Tensor, num_clips: int) -> torch.Tensor:
    """How far the codebooks are from even use, from 0 (even) to 1 (one code), summed over frames.

    Each clip's own mean distribution is judged and weighted by its frames. The paper judges the batch's; that sum is
    not additive over micro-batches, so accumulation would change the loss. For a batch of one clip the two agree.

    Args:
        probabilities: (M, G, V) code probabilities at the masked frames.
        clips: (M,) which clip each frame is of.
        num_clips: B.
    """
    counts = torch.zeros(num_clips, device=clips.device).index_add(0, clips, torch.ones_like(clips, dtype=torch.float))
    totals = probabilities.new_zeros(num_clips, *probabilities.shape[1:]).index_add(0, clips, probabilities)
    mean = totals / counts.clamp_min(1)[:, None, None]
    perplexities = torch.exp(-(mean * (mean + 1e-7).log()).sum(-1)).sum(-1)  # (B, G, V) -> (B,)
    num_codevectors = probabilities.shape[1] * probabilities.shape[2]
    return (counts * (num_codevectors - perplexities) / num_codevectors).sum()


class Wav2Vec2Contrastive(Objective):
    """Tell, at masked frames, the quantised true frame from quantised frames elsewhere in the same clip.

    Learns frame-level content together with its own discrete units, for speech recognition. Watch `code_perplexity`
    (it must not sink to a few codes) and `accuracy` against chance, 1 / (1 + num_negatives).

    Args:
        config: the encoder's configuration.
        num_negatives: distractors per masked frame, K (100 in the paper).
        temperature: of the contrastive loss, κ (0.1).
        num_codebooks, codebook_size: groups G and codewords V of the product quantiser (2 and 320).
        codevector_dim: channels of a quantised frame (256 for Base).
        proj_dim: channels in which prediction and target are compared (256 for Base).
        diversity_weight: weight α of the diversity loss. 0.1 in the paper, whose batch is 1.6 hours; with it, and with
            0.3, batches of 20 s brought the codes down to a handful in 200 updates.
        gumbel_temperature_start, gumbel_temperature_end: of the Gumbel softmax (2 → 0.5).
        gumbel_anneal: share of the run after which the lower temperature is reached, geometrically. The paper's factor
            of 0.999995 per update reaches it after 277,000 of 400,000 updates.

    With corrupted input the targets come from a second pass over the clean clip, of which the layers are not needed.

    Source: Baevski et al. 2020, arXiv 2006.11477, eq. 2 to 4. Differs from it in the diversity loss, see there.
    """

    uses_mask = True
    learns_codes = True
    remedy = "lower learning_rate, raise wav2vec2.diversity_weight, start the Gumbel temperature higher."

    def __init__(
        self,
        config,
        num_negatives: int = 100,
        temperature: float = 0.1,
        num_codebooks: int = 2,
        codebook_size: int = 320,
        codevector_dim: int = 256,
        proj_dim: int = 256,
        diversity_weight: float = 0.5,
        gumbel_temperature_start: float = 2.0,
        gumbel_temperature_end: float = 0.5,
        gumbel_anneal: float = 0.7,
    ):
        super().__init__()
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.diversity_weight = diversity_weight
        self.gumbel_temperature_start, self.gumbel_temperature_end = gumbel_temperature_start, gumbel_temperature_end
        self.gumbel_anneal = gumbel_anneal
        self.gumbel_temperature = gumbel_temperature_start
        self.quantizer = GumbelVectorQuantizer(features_dim(config), codevector_dim, codebook_size, num_codebooks)
        self.project_target = nn.Linear(codevector_dim, proj_dim)
        self.project_prediction = nn.Linear(config.hidden_size, proj_dim)

    def set_progress(self, progress):
        ratio = self.gumbel_temperature_end / self.gumbel_temperature_start
        self.gumbel_temperature = self.gumbel_temperature_start * ratio ** min(progress / self.gumbel_anneal, 1.0)

    def collator_options(self):
        return {"num_negatives": self.num_negatives}

    def forward(self, encoder, batch):
        mask, masked = batch["mask_time_indices"], batch["masked_positions"]
        outputs = encoder(batch["input_values"], attention_mask=batch.get("attention_mask"), mask_time_indices=mask)
        if "extract_features" not in outputs:
            raise TypeError(
                "wav2vec2 needs an encoder that gives extract_features, as SpeechCLModel and Wav2Vec2Model; found "
                f"{type(encoder).__name__}"
            )
        if "clean_values" in batch:
            clean_features = encoder(batch["clean_values"], attention_mask=batch.get("attention_mask")).extract_features
        else:
            clean_features = outputs.extract_features
        # (B, T, C) -> (M, C)
        codevectors, probabilities, codes = self.quantizer(take_frames(clean_features, masked), self.gumbel_temperature)
        targets = self.project_target(codevectors.to(self.project_target.weight.dtype))
        predictions = self.project_prediction(take_frames(outputs.last_hidden_state, masked))
        logits = contrastive_logits(
            predictions, targets, codes, batch["negative_indices"][:, : self.num_negatives], self.temperature
        )

        contrastive = -logits.log_softmax(-1)[:, 0].sum()
        diversity = diversity_loss(probabilities, masked // mask.shape[1], len(mask))
        with torch.no_grad():
            metrics = {
                "contrastive_loss": contrastive.detach(),
                "diversity_loss": diversity.detach(),
                "accuracy": first_is_best(logits).sum(),
                "chance": (1 / logits.isfinite().sum(-1)).sum(),
                "codes": code_histogram(codes, self.quantizer.codebook_size),
            }
        return ObjectiveOutput(
            loss=contrastive + self.diversity_weight * diversity,
            num_items=self.count_items(batch),
            metrics=metrics,
        )

    def summarize(self, metrics, num_items):
        codes = metrics.pop("codes")
        return {
            **super().summarize(metrics, num_items),
            **code_usage(codes),
            "gumbel_temperature": self.gumbel_temperature,
        }
