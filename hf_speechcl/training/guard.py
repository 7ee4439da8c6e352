"""The collapse guard: whether the vectors of every stage still differ, judged at each validation."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import nn

from ..modeling_speechcl import length_mask
from ..objectives import ObjectiveOutput
from ..pretraining import SpeechCLForPreTraining, objective_options
from .arguments import SpeechTrainingArguments

logger = logging.getLogger(__name__)

VERDICTS = ("healthy", "suspicious", "collapsed")
MAX_VECTORS = 2048
VECTORS_PER_BATCH = 64
# (collapsed below, suspicious below)
STD_LIMITS = (0.08, 0.15)
FRAME_STD_LIMITS = (0.03, 0.08)  # frames of an encoder may have much in common and still tell all there is
RANK_LIMITS = (1.5, 3.0)
PERPLEXITY_LIMITS = (1.5, 4.0)
DECISIVE = (
    "temperature",
    "temperature_start",
    "margin",
    "stop_gradient",
    "diversity_weight",
    "decay_start",
    "decay_end",
)


class CollapseError(RuntimeError):
    """A run whose vectors became all alike, and that was to be stopped for it."""


def embedding_std(vectors: torch.Tensor) -> float:
    """Spread of the directions of vectors (N, D): standard deviation of unit vectors, mean over channels, times √D.

    About 1 where they point everywhere, 0 where they are all the same. Source: Chen and He 2020, arXiv 2011.10566,
    section 4.1.
    """
    unit = nn.functional.normalize(vectors.float(), dim=-1)
    return (unit.std(0, correction=0).mean() * math.sqrt(vectors.shape[1])).item()


def effective_rank(vectors: torch.Tensor) -> float:
    """Number of directions that centred vectors (N, D) spread in: exp of the entropy of their singular values.

    Not a number if a vector is none.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    if not vectors.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(vectors.double() - vectors.double().mean(0))
    shares = values / values.sum().clamp_min(1e-12)
    return torch.special.entr(shares).sum().exp().item()


class CollapseGuard:
    """Watches validation and says healthy, suspicious or collapsed, with the likely cause and a remedy.

    It looks at the stages front_end (`extract_features`), encoder (`last_hidden_state`) and, for every objective, at
    the vectors it names in `ObjectiveOutput.states`: for each the spread (`embedding_std`) and `effective_rank`; at
    the perplexity of learned codes; and at accuracies against chance.

    Args:
        model: what is trained.
        learning_rate: the highest of the run.
        stop_after: raise `CollapseError` after so many verdicts "collapsed" in a row; 0 for never.
    """

    def __init__(self, model: SpeechCLForPreTraining, learning_rate: float, stop_after: int = 0):
        self.model, self.learning_rate, self.stop_after = model, learning_rate, stop_after
        self.vectors: dict[str, list[torch.Tensor]] = {}
        self.collapsed_in_a_row = 0
        self.judged = -1
        self.verdict = ""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at what the encoder gives."""
        self.vectors = {}
        hook = self.model.speechcl.register_forward_hook(self._observe_encoder, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _observe_encoder(self, encoder, arguments, options, output) -> None:
        mask = torch.ones(output.last_hidden_state.shape[:2], dtype=torch.bool, device=encoder.device)
        if options.get("attention_mask") is not None:
            lengths = encoder._get_feat_extract_output_lengths(options["attention_mask"].sum(-1))
            mask = length_mask(lengths, mask.shape[1])
        self.observe("front_end", output.extract_features[mask])
        self.observe("encoder", output.last_hidden_state[mask])

    def observe_states(self, outputs: dict[str, ObjectiveOutput]) -> None:
        """Look at the vectors that objectives name."""
        for name, output in outputs.items():
            for stage, vectors in output.states.items():
                self.observe(f"{name}_{stage}", vectors)

    def observe(self, stage: str, vectors: torch.Tensor) -> None:
        """Keep some of (N, D), evenly spaced."""
        kept = self.vectors.setdefault(stage, [])
        if sum(map(len, kept)) < MAX_VECTORS:
            kept.append(vectors[:: -(-len(vectors) // VECTORS_PER_BATCH) or 1].detach().float().cpu())

    def judge(self, scalars: dict[str, float], update: int) -> dict[str, float]:
        """Log the verdict on what was seen since `watching`, on all ranks.

        Args:
            scalars: of the objectives, `{"name/metric": value}`.
            update: number of updates made.

        Returns:
            `guard/STAGE_std` and `guard/STAGE_rank` of every stage, and `guard/verdict`: 0, 1 or 2.

        Raises:
            CollapseError: collapsed for the `stop_after`-th time in a row.
        """
        seen = {stage: torch.cat(parts) for stage, parts in self.vectors.items() if parts}
        stages: dict[str, list[torch.Tensor]] = {}
        for part in gather_object([seen]):
            for stage, vectors in part.items():
                stages.setdefault(stage, []).append(vectors)
        findings: list[tuple[int, str, str]] = []
        report = {}
        for stage, parts in sorted(stages.items()):
            vectors = torch.cat(parts)
            if len(vectors) < 2:
                continue
            report[f"guard/{stage}_std"] = std = embedding_std(vectors)
            report[f"guard/{stage}_rank"] = rank = effective_rank(vectors)
            limits = FRAME_STD_LIMITS if stage in ("front_end", "encoder") else STD_LIMITS
            level = max(_level(std, limits), _level(rank, RANK_LIMITS) if vectors.shape[1] >= 8 else 0)
            findings.append((level, stage, f"{stage}: embedding std {std:.2f}, effective rank {rank:.1f}"))
        for name in self.model.objectives:
            findings += self._judge_metrics(name, scalars)
        level = max((level for level, *_ in findings), default=0)
        self.verdict = VERDICTS[level]
        reasons = "; ".join(text for found, _, text in findings if found == level)
        if level == 0:
            logger.info("collapse guard, update %d: healthy (%s)", update, reasons)
        else:
            worst = {where for found, where, _ in findings if found == level}
            logger.warning("collapse guard, update %d: %s. %s. %s", update, self.verdict, reasons, self._explain(worst))
        if self.verdict != "collapsed":
            self.collapsed_in_a_row = 0
        elif update > self.judged:
            self.collapsed_in_a_row += 1
        self.judged = update
        if self.stop_after and self.collapsed_in_a_row >= self.stop_after:
            raise CollapseError(
                f"stopped at update {update}, as stop_on_collapse asks: {reasons}. {self._explain(worst)}"
            )
        return report | {"guard/verdict": level}

    def _judge_metrics(self, name: str, scalars: dict[str, float]) -> list[tuple[int, str, str]]:
        findings = []
        perplexity = scalars.get(f"{name}/code_perplexity")
        if perplexity is not None and self.model.objectives[name].learns_codes:
            used = scalars[f"{name}/codes_used"]
            text = f"{name}: {used:.0f} codes in use, perplexity {perplexity:.1f}"
            findings.append((_level(perplexity, PERPLEXITY_LIMITS), name, text))
        accuracy, chance = scalars.get(f"{name}/accuracy"), scalars.get(f"{name}/chance")
        if accuracy is not None and chance is not None:
            text = f"{name}: accuracy {accuracy:.3f} against {chance:.3f} by chance"
            level = 2 if chance > 0.9 else 1 if accuracy <= 1.1 * chance else 0
            findings.append((level, name, text))
        return findings

    def _explain(self, where: set[str]) -> str:
        """Likely cause and remedy: options far from their defaults, then what the objectives advise."""
        names = [name for name in self.model.objectives if any(place.startswith(name) for place in where)]
        names = names or list(self.model.objectives)
        usual = SpeechTrainingArguments.__dataclass_fields__["learning_rate"].default
        causes = []
        if self.learning_rate > 3 * usual:
            causes.append(f"learning_rate is {self.learning_rate:g}, where {usual:g} is usual")
        for name in names:
            known = objective_options(name)
            for option, value in self.model.config.objectives[name].items():
                if option.endswith(DECISIVE) and _far(value, known[option].default):
                    causes.append(f"{name}.{option} is {value!r}, where {known[option].default!r} is usual")
        cause = f"Likely cause: {'; '.join(causes)}. " if causes else ""
        return cause + "Remedy: " + " ".join(f"{self.model.objectives[name].remedy}" for name in names)


def _level(value: float, limits: tuple[float, float]) -> int:
    collapsed, suspicious = limits
    return 2 if not value >= collapsed else 1 if value < suspicious else 0


def _far(value, default) -> bool:
    if isinstance(default, bool):
        return value != default
    return isinstance(default, int | float) and default > 0 and not default / 5 <= value <= 5 * default
