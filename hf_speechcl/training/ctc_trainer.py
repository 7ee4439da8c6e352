"""The Trainer of CTC: error rates at each validation, and a guard against models that write nothing."""

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from ..command_line import option
from ..evaluation.asr import SpeechErrorRates
from ..modeling_speechcl import length_mask
from ..objectives import ObjectiveOutput
from .finetuning import FineTuningArguments, FineTuningTrainer, frozen_steps
from .guard import CollapseError

logger = logging.getLogger(__name__)

PATIENCE = 300  # updates after the warm-up in which CTC models are used to write nothing
SAME_SHARE = 0.9  # of all clips with one and the same text, mostly an empty one


@dataclass
class CTCTrainingArguments(FineTuningArguments):
    output_dir: str = option("runs/ctc", "Folder for checkpoints, the model and its card.")
    metric_for_best_model: str | None = option("wer", "Validation metric that the best checkpoint has the lowest of.")
    greater_is_better: bool | None = option(False, "Whether the best checkpoint has the highest instead.")


class BlankGuard:
    """Watches validation for blank collapse, the usual failure of CTC: the model writes nothing, or the same text for
    every clip, and goes on doing so.

    Every run begins that way, so it is not judged before `PATIENCE` updates after warm-up and frozen updates.

    Args:
        args: of the training.
    """

    def __init__(self, args: CTCTrainingArguments):
        self.args = args
        self.collapsed_in_a_row = 0
        self.judged = -1
        self.verdict = ""

    def judge(
        self, hypotheses: list[str], references: list[str], blank_share: float, update: int, num_updates: int
    ) -> None:
        """Log a verdict: healthy, suspicious (the run ends too early to tell) or collapsed.

        Args:
            hypotheses, references: of all validation clips.
            blank_share: of all frames.
            update, num_updates: made, and of the whole run.

        Raises:
            CollapseError: collapsed for the `stop_on_collapse`-th time in a row.
        """
        text, count = Counter(hypotheses).most_common(1)[0]
        same = count / len(hypotheses)
        found = (
            f"{100 * blank_share:.1f}% of frames are blank, {100 * same:.0f}% of {len(hypotheses)} hypotheses are "
            + (f"all the same ({text[:40]!r})" if text else "empty")
        )
        frozen = frozen_steps(max(self.args.freeze_encoder_steps, 0), num_updates)
        settled = max(self.args.get_warmup_steps(num_updates), frozen) + PATIENCE
        if same < SAME_SHARE or max(Counter(references).values()) >= SAME_SHARE * len(references):
            self.verdict = "healthy"
        elif update >= settled:
            self.verdict = "collapsed"
            logger.warning("blank guard, update %d: collapsed. %s. %s", update, found, self._explain(num_updates))
        elif update >= num_updates:
            self.verdict = "suspicious"
            logger.warning(
                "blank guard, update %d: suspicious. %s. CTC models begin that way: train for more than %d updates",
                update,
                found,
                settled,
            )
        else:
            self.verdict = "healthy"
            logger.info("blank guard, update %d: %s, as is usual up to update %d", update, found, settled)
        if self.verdict != "collapsed":
            self.collapsed_in_a_row = 0
        elif update > self.judged:
            self.collapsed_in_a_row += 1
        self.judged = update
        if self.args.stop_on_collapse and self.collapsed_in_a_row >= self.args.stop_on_collapse:
            raise CollapseError(
                f"stopped at update {update}, as stop_on_collapse asks: {found}. {self._explain(num_updates)}"
            )

    def _explain(self, num_updates: int) -> str:
        usual = CTCTrainingArguments.__dataclass_fields__
        causes = [
            f"{name} is {getattr(self.args, name):g}, where {usual[name].default:g} is usual"
            for name in ("learning_rate", "head_learning_rate")
            if getattr(self.args, name) > 3 * usual[name].default
        ]
        if (warmup := self.args.get_warmup_steps(num_updates)) < 0.05 * num_updates:
            causes.append(f"warm-up is {warmup} of {num_updates} updates, where a tenth is usual")
        cause = f"Likely cause: {'; '.join(causes)}. " if causes else ""
        return (
            f"{cause}Remedy: divide learning_rate and head_learning_rate by three, raise warmup_steps, train for more "
            "updates, and see whether the texts belong to the audio and what was done to them (text_train.json, "
            "preflight_train.json)"
        )


class CTCTrainer(FineTuningTrainer):
    """Trains a `SpeechCLForCTC`; its one objective, "ctc", counts labels.

    Args:
        references: texts of the validation set, as the model is to write them.
        kwargs: as for `SpeechTrainer`.
    """

    def __init__(self, *, references: list[str], **kwargs):
        super().__init__(**kwargs)
        self.references = references
        self.hypotheses: list[tuple[int, str]] = []
        self.guard = BlankGuard(self.args)

    def objective_outputs(self, model, inputs):
        index = inputs.pop("index")
        outputs = model(**inputs)
        metrics = {}
        if not model.training:
            tokens, blank = outputs.logits.argmax(-1)[: len(index)], self.model.config.pad_token_id
            frames = torch.full_like(index, tokens.shape[1])
            if "attention_mask" in inputs:
                frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
            is_own = length_mask(frames, tokens.shape[1])
            # Not all models, such as the peer of the benchmarks, are sure of the blank on padding; and between two
            # spaces with a blank between them no decoder writes a word.
            texts = self.processing_class.batch_decode(tokens.masked_fill(~is_own, blank))
            self.hypotheses += zip(index.tolist(), (" ".join(text.split()) for text in texts))
            is_blank = (tokens == blank) & is_own
            metrics = {"blanks": is_blank.sum(), "frames": frames.sum()}
        loss = outputs.loss * (len(index) > 0)  # the silence that stands for a batch without clips teaches nothing
        return {"ctc": ObjectiveOutput(loss, self.count_items(inputs)["ctc"], metrics)}

    def count_items(self, inputs):
        return {"ctc": (inputs["labels"] >= 0).sum()}

    def objective_weights(self):
        return {"ctc": 1.0}

    def evaluate(self, *args, **kwargs):
        self.hypotheses = []
        return super().evaluate(*args, **kwargs)

    def summarize_metrics(self, name, output, num_items):
        if not output.metrics:
            return {}
        return {"blank_share": (output.metrics["blanks"] / output.metrics["frames"].clamp_min(1)).item()}

    def summarize(self, sums):
        scalars = super().summarize(sums)
        if self.is_validating:
            found = dict(gather_object(self.hypotheses))
            self.hypotheses = []
            hypotheses = [found.get(index, "") for index in range(len(self.references))]
            scalars |= SpeechErrorRates().compute(predictions=hypotheses, references=self.references)
            scalars["ctc/empty_share"] = hypotheses.count("") / len(hypotheses)
            blank_share = scalars.get("ctc/blank_share", 1.0)
            self.guard.judge(hypotheses, self.references, blank_share, self.taken_update, self.state.max_steps)
        return scalars
