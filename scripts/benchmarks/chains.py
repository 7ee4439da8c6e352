"""Chains of the comparison: a pre-training and what is fine-tuned from it, run and written into the results."""

import contextlib
import datetime
import json
import logging
import os
import shutil
import threading
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from processes import Processes, Results, RunError, beside, commit, made_once, only_one, train
from recipes import Recipe, checksum, clock_of, to_argv
from tiers import TierData

from hf_speechcl.evaluation.asr import edit_counts
from hf_speechcl.machine import describe_machine, machine_of

logger = logging.getLogger(__name__)

PEER = "benchmarks/peer.py"
PROBE_SCORES = {"probe_accuracy": "phone_accuracy", "abx_error": "abx_error"}
NOTHING = {"wall_seconds": 0.0, "cpu_seconds": 0.0, "updates": 0, "audio_hours": 0.0, "resumed": False}
TRAINER_OPTIONS = {"eval_strategy": "no", "disable_tqdm": True, "report_to": "none"}


@dataclass
class Chain:
    """A pre-training, and what is fine-tuned from it.

    Attributes:
        recipe: what is done.
        seed: of all of it.
        table, phase: see the options.
        folder: where.
        sizes: label sizes that have no row yet.
        measured_in: hash of the pre-training of the reference arm, or of the arm of the budget, if the length is
            measured in that.
        reference: the arm that it is trained as long as, in the table of equal time.
    """

    recipe: Recipe
    seed: int
    table: str
    phase: str
    folder: Path
    sizes: list[str]
    measured_in: str | None = None
    reference: Recipe | None = None

    def run_name(self, size: str) -> str:
        recipe = self.recipe
        return f"{recipe.tier}/{recipe.arm}/{self.folder.name}/{self.phase}-{size}-{recipe.finetuning_hash(size)}"

    def model_folder(self, size: str) -> Path:
        """Of the fine-tuned model."""
        return self.folder / self.run_name(size).rsplit("/", 1)[1]

    def recipe_name(self, size: str) -> str:
        recipe = self.recipe
        return checksum([recipe.pretraining_hash(), recipe.finetuning_hash(size), self.table, self.measured_in])


def probe_scores(encoder: Path | None) -> dict[str, float | None]:
    """What the probe found at the end of pre-training; None from scratch and of the peer."""
    file = encoder and encoder / "results.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    return {name: found.get(f"eval_probe/{key}") for name, key in PROBE_SCORES.items()}


def chain_name(recipe: Recipe, seed: int, measured_in: str | None = None) -> str:
    """Of its folder: the same for all that is fine-tuned from one pre-training."""
    return f"seed{seed}-{recipe.pretraining_hash()}" + (f"-of-{measured_in}" if measured_in else "")


class Comparison:
    """Runs chains.

    Args:
        config: the YAML.
        data: by tier.
        results: where rows are added.
    """

    def __init__(self, config: dict, data: dict[str, TierData], results: Results):
        self.config, self.data, self.results = config, data, results
        self.processes = {tier: Processes(config["tiers"][tier]["threads"]) for tier in data}
        self.measuring = defaultdict(threading.Lock)  # by encoder
        self.working = defaultdict(threading.Lock)  # by the folder of a fine-tuned model

    def encoder_folder(self, chain: Chain) -> Path:
        """Of the pre-training that the chain begins with, which may be another arm's."""
        return chain.folder.parents[1] / chain.recipe.encoder_arm / chain.folder.name

    @contextlib.contextmanager
    def _at_work(self, folder: Path):
        """Alone in this folder: threads wait for each other, another process is an error."""
        with self.working[folder], only_one(beside(folder, ".lock")) as lock:
            yield lock

    def make_encoder(self, chain: Chain) -> tuple[Path | None, dict]:
        """The encoder's folder, None from scratch; and what it took."""
        if not chain.recipe.stages:
            return None, dict(NOTHING)
        folder = self.encoder_folder(chain)
        with only_one(folder / "lock") as lock:
            return self._pretrain(replace(chain, folder=folder), lock)

    def finish(self, chain: Chain, size: str, encoder: Path | None, took: dict) -> None:
        """Go from an encoder, which took this, to a row for a label size."""
        with self._at_work(chain.model_folder(size)) as lock:
            start = encoder
            if chain.recipe.self_training is not None:
                start, took = self._self_train(chain, size, encoder, took, lock)
            self._finetune(chain, size, start, took, lock)
            if chain.recipe.self_training is not None and not self.config["keep_models"]:
                (start / "model.safetensors").unlink(missing_ok=True)
        logger.info("finished %s", chain.run_name(size))

    def stop(self) -> None:
        for processes in self.processes.values():
            processes.stop()

    def _tier(self, chain: Chain) -> dict:
        return self.config["tiers"][chain.recipe.tier]

    def _device(self, chain: Chain) -> str:
        return "cpu" if self._tier(chain)["device"] == "cpu" or not torch.cuda.is_available() else "cuda"

    def _machine(self, chain: Chain) -> str:
        return describe_machine("transformers", device=self._device(chain), threads=self._tier(chain)["threads"])

    def _only_cpu(self, chain: Chain, option: dict) -> dict:
        """An option that says so to a script, where that may not use a GPU which is there."""
        return option if self._device(chain) == "cpu" else {}

    def _train(self, chain: Chain, script: tuple[str, ...], folder: Path, options: dict, lock: int) -> dict:
        shown = {"seed": chain.seed, **self._only_cpu(chain, {"use_cpu": True})}
        if script != (PEER, "pretrain"):
            shown |= TRAINER_OPTIONS | {"logging_steps": max(1, options["max_steps"] // 50)}
        argv = [*script[1:], *to_argv({**options, **shown})]
        return train(self.processes[chain.recipe.tier], script[0], folder, argv, self.config["save_steps"], lock)

    def _self_train(self, chain: Chain, size: str, encoder: Path | None, took: dict, lock: int) -> tuple[Path, dict]:
        """A student, ready for its last fine-tuning, and what it took, pre-training included.

        The first teacher is the model of the arm whose encoder it is, which is trained if it is not there. In each
        round the teacher writes texts of the unlabelled audio; the encoder, later the student before, learns from these
        and from the labels, and is the next teacher."""
        recipe, processes = chain.recipe, self.processes[chain.recipe.tier]
        own = recipe.self_training[size]
        of_size = f"-{chain.phase}-{size}-{recipe.finetuning_hash(size)}"
        teaching = replace(recipe, arm=recipe.encoder_arm, self_training=None)
        teaching = replace(chain, recipe=teaching, folder=self.encoder_folder(chain))
        start, teacher = encoder, teaching.model_folder(size)
        with self._at_work(teacher) as its_lock:
            if not (teacher / "model.safetensors").is_file():  # deleted, as it was no teacher then
                beside(teacher, ".json").unlink(missing_ok=True)
            done = [self._train_recognizer(teaching, size, encoder, teacher, its_lock)]
        for number in range(1, own["rounds"] + 1):
            texts, student = (chain.folder / f"{kind}{number}{of_size}" for kind in ("pseudo_labels", "student"))
            options = {"model": str(teacher), "corpus": self.data[recipe.tier].same_language, "output_dir": str(texts)}
            options |= self._only_cpu(chain, {"device": "cpu"})

            def write(options=options, texts=texts) -> dict:
                shutil.rmtree(texts, ignore_errors=True)  # from the beginning, so that all of it is timed
                return processes.run("make_pseudo_labels.py", to_argv(options), beside(texts, ".log"), lock)

            done.append(made_once(beside(texts, ".json"), write))
            changes = {**own["student"], "pseudo_labels": [str(texts)]}
            done.append(self._train_recognizer(chain, size, start, student, lock, changes))
            shutil.rmtree(texts, ignore_errors=True)
            if number > 1 and not self.config["keep_models"]:
                (teacher / "model.safetensors").unlink(missing_ok=True)
            start = teacher = student
        return student, {name: value + sum(part.get(name) or 0 for part in done) for name, value in took.items()}

    def _pretrain(self, chain: Chain, lock: int) -> tuple[Path, dict]:
        recipe, encoder, took = chain.recipe, None, dict(NOTHING)
        data = self.data[recipe.tier]
        script = (PEER, "pretrain") if recipe.is_peer else ("pretrain.py",)
        scale = 1.0
        if chain.reference is not None:
            name = "scale-{}-{}".format(*self.config["timed_updates"])
            scale = self._kept(chain, name, partial(self._scale, chain, lock))
        for number, stage in enumerate(recipe.stages, start=1):
            options = {**stage["pretraining"], "corpus": data.near if "near" in stage else data.unlabelled}
            if not recipe.is_peer:
                options["probe_corpus"] = [data.probe]
            if options.get("seconds") == "reference":
                options["seconds"] = self._kept(chain, "seconds", partial(self._reference_seconds, chain))
            if "max_steps" in options:
                options["max_steps"] = max(1, round(options["max_steps"] * scale))
            done = []
            if stage["units"] is not None:
                folder = chain.folder / f"units{number}"
                done.append(self._make_units(chain, stage["units"], options["corpus"], encoder, folder, lock))
                options["units"] = str(folder)
            if stage["continues"]:
                options["encoder"] = str(encoder)
                options.pop("encoder_options", None)
            encoder = chain.folder / f"stage{number}"
            done.append(self._train(chain, script, encoder, options, lock))
            for part in done:
                took |= {name: value + (part.get(name) or 0) for name, value in took.items()}
        return encoder, took

    def _make_units(
        self, chain: Chain, options: dict, corpus: list[str], encoder: Path | None, folder: Path, lock: int
    ) -> dict:
        """Units for a stage; what they took."""
        options = {**options, "corpus": corpus, "seed": chain.seed, "output_dir": str(folder)}
        if "layer" in options:
            options["features"] = str(encoder)
        options |= self._only_cpu(chain, {"device": "cpu"})

        def make() -> dict:
            shutil.rmtree(folder, ignore_errors=True)  # from the beginning, so that all of it is timed
            processes = self.processes[chain.recipe.tier]
            return processes.run("make_units.py", to_argv(options), beside(folder, ".log"), lock)

        return made_once(beside(folder, ".json"), make)

    def _few_shot(self, chain: Chain, encoder: Path | None, lock: int) -> float | None:
        """Accuracy of telling speakers by a few clips; None from scratch, of the peer and of recognisers."""
        if encoder is None or chain.recipe.is_peer or chain.recipe.self_training is not None:
            return None
        tier, file = chain.recipe.tier, beside(encoder, f".few_shot.{os.getpid()}.json")

        def measure() -> float:
            options = {**self.config["few_shot"], "models": [str(encoder)], "corpus": [self.data[tier].voices]}
            argv = to_argv({**options, "output_file": str(file)})
            self.processes[tier].run("benchmarks/few_shot.py", argv, beside(encoder, ".few_shot.log"), lock)
            accuracy = json.loads(file.read_text(encoding="utf-8"))["results"][str(encoder)]["accuracy"]
            file.unlink()
            return accuracy

        with self.measuring[encoder]:  # once for all label sizes
            return self._kept(chain, f"{encoder.name}.few_shot-{checksum(self.config['few_shot'])}", measure)

    def _train_recognizer(
        self,
        chain: Chain,
        size: str,
        encoder: Path | None,
        folder: Path,
        lock: int,
        changes: dict | None = None,
    ) -> dict:
        """Fine-tune into the folder, from new weights without an encoder, with changed options; what it took."""
        recipe = chain.recipe
        corpus = self.data[recipe.tier].labels(chain.phase, size, chain.seed).corpus
        options = {**recipe.finetuning[size], **(changes or {}), "corpus": [corpus]}
        if encoder is not None:
            options["model"] = str(encoder)
        else:
            options["model"] = recipe.encoder["encoder"]
            options["model_options"] = {**recipe.encoder.get("encoder_options", {}), **options.get("model_options", {})}
        if recipe.budget is not None:
            name = f"{folder.name}.updates"
            options["max_steps"] = self._kept(chain, name, partial(self._whole_budget, chain, size))
        options["load_best_model_at_end"] = False
        script = (PEER, "finetune") if recipe.is_peer else ("finetune_ctc.py",)
        return self._train(chain, script, folder, options, lock)

    def _finetune(self, chain: Chain, size: str, encoder: Path | None, pretraining: dict, lock: int) -> None:
        recipe, folder = chain.recipe, chain.model_folder(size)
        labels = self.data[recipe.tier].labels(chain.phase, size, chain.seed)
        last = recipe.self_training and recipe.self_training[size]["last"]
        took = self._train_recognizer(chain, size, encoder, folder, lock, last)
        scores_file = beside(folder, ".scores.json")
        begun = beside(folder, ".begun.json")
        source, split = labels.scored
        scoring = {"model": str(folder), "corpus": [source], "split": split, "output_file": str(begun)}
        scoring |= self._only_cpu(chain, {"device": "cpu"})
        if not scores_file.is_file():
            self.processes[recipe.tier].run("evaluate.py", to_argv(scoring), beside(folder, ".log"), lock)
            begun.replace(scores_file)
        scores = json.loads(scores_file.read_text(encoding="utf-8"))
        validation = json.loads((folder / "results.json").read_text(encoding="utf-8")) if labels.held_out else {}
        self.results.add(
            {
                "run": chain.run_name(size),
                "recipe": chain.recipe_name(size),
                "tier": recipe.tier,
                "phase": chain.phase,
                "table": chain.table,
                "arm": recipe.arm,
                "seed": chain.seed,
                "labels": size,
                "label_minutes": labels.minutes,
                "options": recipe.to_json(size),
                **{f"{name}{end}": scores[f"{name}{end}"] for name in ("cer", "wer") for end in ("", "_low", "_high")},
                **clip_counts(scores["transcripts"]),
                "validation_cer": validation.get("eval_cer"),
                "validation_wer": validation.get("eval_wer"),
                "loss_before": took["loss_before"],
                "loss_last": took["loss_last"],
                "updates": pretraining["updates"],
                "audio_hours": pretraining["audio_hours"],
                "pretraining_wall_seconds": pretraining["wall_seconds"],
                "pretraining_cpu_seconds": pretraining["cpu_seconds"],
                "finetuning_updates": took["updates"],
                "finetuning_wall_seconds": took["wall_seconds"],
                "finetuning_cpu_seconds": took["cpu_seconds"],
                "resumed": bool(took["resumed"] or pretraining["resumed"]),
                "parameters": took["parameters"],
                **probe_scores(encoder),
                "few_shot": self._few_shot(chain, encoder, lock),
                "commit": commit(),
                "device": self._device(chain),
                "machine": self._machine(chain),
                "finished": datetime.datetime.now(),
            }
        )
        if not self.config["keep_models"] and not recipe.is_teacher:
            (folder / "model.safetensors").unlink(missing_ok=True)

    def _kept(self, chain: Chain, name: str, measure) -> float:
        """A number measured once for a chain, which stays what it was then."""
        return made_once(chain.folder / f"{name}.json", lambda: {"value": measure()})["value"]

    def _mean(self, chain: Chain, arm: str, pretraining: str, value, run: str = "", **same) -> float:
        """Mean over seeds, of each its newest row in the table of equal updates and of the same device, of an arm with
        this hash of its pre-training, and with this end of its run's name.

        Raises:
            RunError: there is none; says what to run.
        """
        wanted = {"tier": chain.recipe.tier, "arm": arm, "table": "updates", "device": self._device(chain), **same}
        found = [row for row in self.results.rows() if all(row[name] == value for name, value in wanted.items())]
        found = [row for row in found if row["run"].split("/")[2] == f"seed{row['seed']}-{pretraining}"]
        rows = list({row["seed"]: row for row in found if row["run"].endswith(run)}.values())
        if not rows:
            shown = ", ".join(f"{name} {value}" for name, value in wanted.items())
            raise RunError(
                f"its length is measured in the time of another run, which has no row in {self.results.file} with the "
                f"recipe that the YAML has now ({shown}): run --arms {arm} --table updates first"
            )
        if others := {machine_of(row["machine"]) for row in rows} - {machine_of(self._machine(chain))}:
            logger.warning("%s: its length is measured in time of another machine: %s", arm, "; ".join(sorted(others)))
        return sum(map(value, rows)) / len(rows)

    def _seconds(self, chain: Chain, kind: str) -> str:
        return f"{kind}_{clock_of(self._tier(chain))}_seconds"

    def _reference_seconds(self, chain: Chain) -> float:
        column = self._seconds(chain, "pretraining")
        return self._mean(chain, self.config["reference_arm"], chain.measured_in, lambda row: row[column])

    def _scale(self, chain: Chain, lock: int) -> float:
        """Updates of an arm in the time of one of the reference arm. Both do two short runs of their first stage in
        turns, as machines and days differ, on the half hour of the probe, which the shorter one hears whole: what the
        longer one takes more is the time of its further updates, on clips that are decoded, as in a long run.

        Raises:
            RunError: something else was at work, so that the longer run was not the longer one.
        """
        folder, corpus = chain.folder / "timing", [self.data[chain.recipe.tier].probe]
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run, whose turns were not in one go
        seconds: dict[str, list[float]] = {}
        for updates in self.config["timed_updates"]:
            for recipe in (chain.reference, chain.recipe):
                stage, place = recipe.stages[0], folder / recipe.arm
                place.mkdir(parents=True, exist_ok=True)
                options = {**stage["pretraining"], "corpus": corpus, "max_steps": updates}
                if stage["units"] is not None:
                    options["units"] = str(place / "units")
                    self._make_units(chain, stage["units"], corpus, None, place / "units", lock)
                took = self._train(chain, ("pretrain.py",), place / str(updates), options, lock)
                seconds.setdefault(recipe.arm, []).append(took[f"{clock_of(self._tier(chain))}_seconds"])
        shutil.rmtree(folder)
        reference, own = (seconds[arm][1] - seconds[arm][0] for arm in (chain.reference.arm, chain.recipe.arm))
        if min(reference, own) <= 0:
            raise RunError(f"updates were timed, and more of them took less time ({seconds} s): run it again")
        return reference / own

    def _whole_budget(self, chain: Chain, size: str) -> int:
        """This arm's own updates of fine-tuning, and further ones that last as long as the pre-training, with
        self-training, of another arm; how long one takes is said by its row, as machines and days differ."""
        before, last, budget = (
            self._seconds(chain, "pretraining"),
            self._seconds(chain, "finetuning"),
            chain.recipe.budget,
        )

        def further_updates(row: dict) -> float:
            return row[before] * row["finetuning_updates"] / row[last]

        same = {"phase": chain.phase, "labels": size, "run": f"-{budget.finetuning_hash(size)}"}
        further = self._mean(chain, budget.arm, chain.measured_in, further_updates, **same)
        return chain.recipe.finetuning[size]["max_steps"] + round(further)


def clip_counts(transcripts: list[dict]) -> dict[str, list]:
    """Clips in the order of their ids, with their errors and lengths in characters and in words."""
    transcripts = sorted(transcripts, key=lambda clip: clip["id"])
    references, hypotheses = ([clip[name] for clip in transcripts] for name in ("reference", "hypothesis"))
    counts: dict[str, list] = {"clips": [clip["id"] for clip in transcripts]}
    for name, characters in (("cer", True), ("wer", False)):
        edits, lengths = edit_counts(references, hypotheses, characters).T.tolist()
        counts |= {f"{name}_edits": edits, f"{name}_lengths": lengths}
    return counts
