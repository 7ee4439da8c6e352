"""The comparison's YAML → what is done for an arm: stages of pre-training, and fine-tuning by label size."""

import copy
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path

import few_shot
import peer
import yaml
from tiers import PHASES, TIERS

from hf_speechcl.training import finetune_ctc, make_units, pretrain

# Options of fine-tuning that the peer shares with all arms; the others are of SpeechCL, or its own.
SHARED_WITH_PEER = ("max_steps", "max_seconds_per_batch", "bf16")
ENCODER_OPTIONS = ("encoder", "encoder_options")
TRAININGS = {"pretraining", "finetuning", "finetuning_by_labels"}
SELF_TRAININGS = {"self_training", "self_training_by_labels"}
KEYS = {
    "config": {"reference_arm", "timed_updates", "keep_models", "save_steps", "few_shot", "tiers", "arms", "quick"}
    | TRAININGS,
    "tier": {"threads", "device", "scores", "labels", "seconds_per_update"} | TRAININGS,
    "arm": {"like", "about", "pretrained", "peer", "whole_budget", "stages", "tiers"} | TRAININGS | SELF_TRAININGS,
    "arm in a tier": TRAININGS | SELF_TRAININGS,
    "self_training": {"rounds", "student", "last"},
    "stage": {"units", "share", "continues", "near", "pretraining"},
    "quick": {"tier", "seeds", "phase", "labels", "arms", "pretraining", "finetuning"},
}

DEVICES, SCORES = ("cpu", "auto"), ("cer", "wer")

# Options that the comparison sets, so that the YAML may not.
SET_HERE = {"corpus", "units", "probe_corpus", "model", "pseudo_labels", "load_best_model_at_end", "seed", "output_dir"}
SET_HERE |= {"use_cpu", "save_steps", "eval_strategy", "disable_tqdm", "report_to", "resume_from_checkpoint"}
NEEDED = {
    "config": KEYS["config"] - TRAININGS,
    "tier": KEYS["tier"] - TRAININGS,
    "quick": {"tier", "seeds", "phase", "labels", "arms"},
}


@dataclass(frozen=True)
class Recipe:
    """What is done for one arm of a tier.

    Attributes:
        tier, arm: names.
        stages: `{"units", "continues", "pretraining"}` each, in their order; none for an arm from scratch. With "near"
            only the unlabelled audio that is like that of the labels.
        encoder: options of the encoder, for arms from scratch.
        is_peer: whether peer.py trains it.
        budget: what takes the time for which it is fine-tuned beyond its own updates, or None.
        finetuning: options by label size.
        encoder_arm: the arm whose encoder it is: its own, but for arms with self-training.
        is_teacher: whether self-trained arms begin with what it writes, so that its fine-tuned models are kept.
        self_training: `{"rounds", "student", "last"}` by label size, or None: options of fine-tuning on pseudo-labels
            and labels, and of the last fine-tuning, on labels alone.
    """

    tier: str
    arm: str
    stages: list[dict]
    encoder: dict
    is_peer: bool
    budget: "Recipe | None"
    finetuning: dict[str, dict]
    encoder_arm: str
    is_teacher: bool
    self_training: dict[str, dict] | None = None

    @property
    def needs_rows(self) -> bool:
        """Whether its length is measured in that of other runs."""
        return self.budget is not None or any(
            stage["pretraining"].get("seconds") == "reference" for stage in self.stages
        )

    @property
    def updates(self) -> int | None:
        """Of pre-training, None where it is given as a time."""
        return None if self.is_peer else sum(stage["pretraining"]["max_steps"] for stage in self.stages)

    def pretraining_hash(self) -> str:
        return checksum(self.stages or self.encoder)

    def finetuning_hash(self, size: str) -> str:
        of_self_training = [] if self.self_training is None else [self.self_training[size]]
        budget = False if self.budget is None else self.budget.time_hash(size)
        return checksum([self.finetuning[size], budget, *of_self_training])

    def time_hash(self, size: str) -> str:
        """Of what its pre-training is, with self-training."""
        return self.pretraining_hash() if self.self_training is None else self.finetuning_hash(size)

    def to_json(self, size: str) -> str:
        """What the table of results keeps."""
        self_training = self.self_training and self.self_training[size]
        kept = {"stages": self.stages, "encoder": self.encoder, "self_training": self_training}
        return json.dumps({**kept, "finetuning": self.finetuning[size]})


def read_config(file: Path) -> dict:
    """The YAML, its names checked.

    Raises:
        ValueError: an unknown key, tier, arm or label size, or one that is missing; says where.
    """
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected KEY: VALUE lines, found {type(config).__name__}")
    _check(config, "config", str(file))
    for name, arm in config["arms"].items():
        if not isinstance(arm, dict):
            raise ValueError(f"arms.{name}: expected KEY: VALUE lines, found {arm}")
        _check_line(config["arms"], name)
    sizes = {}
    for name, tier in config["tiers"].items():
        _check(tier, "tier", f"tiers.{name}")
        if name not in TIERS or set(tier["labels"]) != set(PHASES):
            raise ValueError(f"tiers.{name}: expected one of {', '.join(TIERS)} with labels for {', '.join(PHASES)}")
        if tier["device"] not in DEVICES or not set(tier["scores"]) <= set(SCORES):
            raise ValueError(
                f"tiers.{name}: expected device {' or '.join(DEVICES)} and scores of {', '.join(SCORES)}, found "
                f"{tier['device']} and {', '.join(tier['scores'])}"
            )
        sizes[name] = {str(size) for phase in tier["labels"].values() for size in phase}
        _check_by_labels(tier, f"tiers.{name}", sizes[name])
    every_size = set().union(*sizes.values())
    _check_by_labels(config, str(file), every_size)
    for name, arm in config["arms"].items():
        _check(arm, "arm", f"arms.{name}")
        for number, stage in enumerate(arm.get("stages") or []):
            _check(stage, "stage", f"arms.{name}.stages[{number}]")
            if "max_steps" in stage.get("pretraining", {}):
                raise ValueError(f"arms.{name}.stages[{number}]: max_steps is shared out among stages: give a share")
        _check_by_labels(arm, f"arms.{name}", every_size)
        for tier, changes in (arm.get("tiers") or {}).items():
            if tier not in config["tiers"]:
                raise ValueError(f"arms.{name}.tiers: there is no tier {tier!r}")
            _check(changes, "arm in a tier", f"arms.{name}.tiers.{tier}")
            _check_by_labels(changes, f"arms.{name}.tiers.{tier}", sizes[tier])
    of_others = measured_in_time(config)
    for name, arm in config["arms"].items():
        own = _inherited(config["arms"], name)
        if (budget := own.get("whole_budget")) is not None and (budget not in config["arms"] or budget in of_others):
            raise ValueError(
                f"arms.{name}.whole_budget: expected an arm with a length of its own updates, found {budget!r}"
            )
        parts = own.get("self_training")
        if parts is None and any(SELF_TRAININGS & set(layer) for layer in [own, *(own.get("tiers") or {}).values()]):
            raise ValueError(f"arms.{name}: it changes self_training, which it does not have")
        if parts is not None:
            if not arm.get("like") or {"pretraining", "stages"} & set(arm):
                raise ValueError(f"arms.{name}: self-training starts from the encoder of another arm: say like which")
            if missing := sorted(KEYS["self_training"] - set(parts)):
                raise ValueError(f"arms.{name}.self_training: missing {', '.join(missing)}")
    _check(config["quick"], "quick", "quick")
    of_few_shot = {field.name for field in fields(few_shot.FewShotArguments)} - {"models", "corpus", "output_file"}
    if unknown := sorted(set(config["few_shot"]) - of_few_shot):
        raise ValueError(f"few_shot: unknown {', '.join(unknown)}; expected {', '.join(sorted(of_few_shot))}")
    if config["reference_arm"] not in config["arms"]:
        raise ValueError(f"reference_arm: there is no arm {config['reference_arm']!r}")
    reference = _inherited(config["arms"], config["reference_arm"])
    if not reference.get("pretrained", True) or {"peer", "self_training"} & set(reference):
        raise ValueError(f"reference_arm: expected a pre-training of this package, found {config['reference_arm']}")
    match config["timed_updates"]:
        case [int(fewer), int(more)] if 0 < fewer < more:
            pass
        case found:
            raise ValueError(f"timed_updates: expected two numbers of updates, the second larger, found {found}")
    return config


def _check(found: dict, kind: str, where: str) -> None:
    if unknown := sorted(set(found) - KEYS[kind]):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; expected {', '.join(sorted(KEYS[kind]))}")
    if missing := sorted(NEEDED.get(kind, set()) - set(found)):
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def _check_line(arms: dict[str, dict], name: str) -> None:
    """That the arms which an arm is like are there and end in one that is like none."""
    line = [name]
    while (like := arms[line[-1]].get("like")) is not None:
        if like not in arms:
            raise ValueError(f"arms.{line[-1]}.like: there is no arm {like!r}")
        if like in line:
            raise ValueError(f"arms.{name}.like: it goes round in a circle, {', '.join([*line, like])}")
        line.append(like)


def _check_by_labels(layer: dict, where: str, sizes: set[str]) -> None:
    """Options by label size, and of self-training, which a script would read hours later or not at all."""
    _check(layer.get("self_training") or {}, "self_training", f"{where}.self_training")
    for name in ("finetuning_by_labels", "self_training_by_labels"):
        for size, options in (layer.get(name) or {}).items():
            if str(size) not in sizes:
                raise ValueError(
                    f"{where}.{name}: there is no label size {size!r}; expected {', '.join(sorted(sizes))}"
                )
            if name == "self_training_by_labels":
                _check(options or {}, "self_training", f"{where}.{name}.{size}")
    for options in (layer.get("self_training"), *(layer.get("self_training_by_labels") or {}).values()):
        rounds = (options or {}).get("rounds")
        if rounds is not None and rounds < 1:
            raise ValueError(f"{where}: expected one round of self-training at least, found rounds: {rounds}")


def build_recipe(config: dict, tier: str, arm: str, sizes: list[str], quick: bool = False) -> Recipe:
    """Options of one arm, later ones over earlier ones: of all, of the tier, of the arm (after the arm that it is
    like), of the arm in this tier; with `quick` those of the quick run last. By label size within each.

    Raises:
        ValueError: an option that the script does not have, or that the comparison sets; says where.
    """
    own = _inherited(config["arms"], arm)
    is_peer = bool(own.get("peer"))
    if is_peer and quick:
        raise ValueError(f"quick.arms: {arm} is trained for a time, and the quick run has updates: leave it out")
    of_all = [config, config["tiers"][tier]]
    of_arm = [own, (own.get("tiers") or {}).get(tier, {}), *([config["quick"]] if quick else [])]

    pretraining = _merge(*(layer.get("pretraining", {}) for layer in [*([] if is_peer else of_all), *of_arm]))
    stages = []
    for stage in (own.get("stages") or [{}]) if own.get("pretrained", True) else []:
        options = _merge(pretraining, stage.get("pretraining", {}))
        if not is_peer:
            options["max_steps"] = max(1, round(pretraining["max_steps"] * stage.get("share", 1)))
        near = {"near": True} if stage.get("near") else {}
        done = {"units": stage.get("units"), "continues": bool(stage.get("continues")), "pretraining": options}
        stages.append({**done, **near})
    finetuning = {}
    for size in sizes:
        shared = _merge(*(_of_size(layer, "finetuning", size) for layer in of_all))
        if is_peer:
            shared = {name: shared[name] for name in SHARED_WITH_PEER if name in shared}
        finetuning[size] = _merge(shared, *(_of_size(layer, "finetuning", size) for layer in of_arm))
    encoder = {} if stages else {name: pretraining[name] for name in ENCODER_OPTIONS if name in pretraining}
    teachers = {
        _encoder_arm(config["arms"], name) for name, arm in _all_inherited(config).items() if "self_training" in arm
    }
    self_training = None
    if "self_training" in own:
        self_training = {size: _merge(*(_of_size(layer, "self_training", size) for layer in of_arm)) for size in sizes}
        for parts in self_training.values():
            parts |= {part: _merge(parts[part]) for part in ("student", "last")}
    for stage in stages:
        _check_options(stage["pretraining"], "pretraining", is_peer, f"{arm} in {tier}")
        _check_options(stage["units"] or {}, "units", is_peer, f"{arm} in {tier}")
    for options in finetuning.values():
        _check_options(options, "finetuning", is_peer, f"{arm} in {tier}")
    for parts in (self_training or {}).values():
        for part in ("student", "last"):
            _check_options(parts[part], "finetuning", is_peer, f"{arm} in {tier}, self_training.{part}")
    return Recipe(
        tier,
        arm,
        stages,
        encoder,
        is_peer,
        budget=build_recipe(config, tier, own["whole_budget"], sizes, quick) if own.get("whole_budget") else None,
        finetuning=finetuning,
        encoder_arm=_encoder_arm(config["arms"], arm),
        is_teacher=arm in teachers,
        self_training=self_training,
    )


def _check_options(options: dict, kind: str, is_peer: bool, where: str) -> None:
    """That a script has these options, and that they are not set here, before anything is trained."""
    types = {"units": make_units.ARGUMENTS, "pretraining": pretrain.ARGUMENTS, "finetuning": finetune_ctc.ARGUMENTS}
    if is_peer:
        types |= {"pretraining": peer.PRETRAINING_ARGUMENTS, "finetuning": peer.FINETUNING_ARGUMENTS}
    known = {field.name for part in types[kind] for field in fields(part) if field.init}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{where}: {kind} has no option {', '.join(unknown)}")
    is_trainers = not (is_peer and kind == "pretraining")
    if set_here := sorted(set(options) & (SET_HERE | ({"logging_steps"} if is_trainers else set()))):
        raise ValueError(f"{where}: {kind} may not say {', '.join(set_here)}, which the comparison sets")


def _encoder_arm(arms: dict[str, dict], name: str) -> str:
    """The arm whose encoder it is: the first that has no self-training of those that it is like."""
    return _encoder_arm(arms, arms[name]["like"]) if "self_training" in _inherited(arms, name) else name


def _of_size(layer: dict, kind: str, size: str) -> dict:
    by_labels = {str(name): options for name, options in layer.get(f"{kind}_by_labels", {}).items()}
    return _merge(layer.get(kind, {}), by_labels.get(size, {}), keeps_null=True)


def clock_of(tier: dict) -> str:
    """What time is measured by: cpu, or wall where a GPU may compute."""
    return "cpu" if tier["device"] == "cpu" else "wall"


def same_in_both_tables(config: dict) -> set[str]:
    """Arms that need no run of their own in the table of equal time: without pre-training, for a time as it is, and the
    one that the time is of."""
    own = _all_inherited(config)
    untrained = {name for name, arm in own.items() if not arm.get("pretrained", True) and "self_training" not in arm}
    return untrained | {name for name, arm in own.items() if arm.get("peer")} | {config["reference_arm"]}


def of_own_length(config: dict) -> set[str]:
    """Arms that have no row in the table of equal time: self-trained ones, and those whose stages together are not as
    long as one pre-training."""

    def has_own_length(arm: dict) -> bool:
        shares = [stage.get("share", 1) for stage in arm.get("stages") or [{}]]
        return "self_training" in arm or abs(sum(shares) - 1) > 1e-6

    return {name for name, arm in _all_inherited(config).items() if has_own_length(arm)}


def measured_in_time(config: dict) -> set[str]:
    """Arms whose length is the time that others took: the peer, and scratch with a whole budget."""
    return {name for name, arm in _all_inherited(config).items() if arm.get("peer") or arm.get("whole_budget")}


def baselines(config: dict) -> set[str]:
    """What others are held against: from scratch, with as many updates or with a whole budget."""
    return {"scratch"} | {name for name, arm in _all_inherited(config).items() if arm.get("whole_budget")}


def whole_budgets(config: dict) -> dict[str, str]:
    """Arms with pre-training, and the one from scratch that has as much time as each, the first there is: arms as long
    as the reference arm have its."""
    own, found = _all_inherited(config), {}
    for name, arm in own.items():
        if arm.get("whole_budget"):
            found.setdefault(arm["whole_budget"], name)
    if config["reference_arm"] not in found:
        return found
    as_long = {name for name, arm in own.items() if arm.get("pretrained", True)} - of_own_length(config)
    return dict.fromkeys(as_long, found[config["reference_arm"]]) | found


def _all_inherited(config: dict) -> dict[str, dict]:
    return {name: _inherited(config["arms"], name) for name in config["arms"]}


def _inherited(arms: dict[str, dict], name: str) -> dict:
    arm = arms[name]
    if arm.get("like") is None:
        return arm
    like = _inherited(arms, arm["like"])
    merged = _merge(like, {key: value for key, value in arm.items() if key != "like"}, keeps_null=True)
    return {key: value for key, value in merged.items() if value is not None}


def _merge(*parts: dict, keeps_null: bool = False) -> dict:
    """Mappings within mappings are merged, everything else is replaced; null takes an option away, or stays to take it
    away from what this is merged into."""
    merged: dict = {}
    for part in parts:
        for name, value in part.items():
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                merged[name] = _merge(merged[name], value, keeps_null=keeps_null)
            elif value is None and not keeps_null:
                merged.pop(name, None)
            else:
                merged[name] = copy.deepcopy(value)
    return merged


def to_argv(options: dict) -> list[str]:
    """Options as they stand on the command line; a mapping is a list of NAME=VALUE."""
    argv = []
    for name, value in options.items():
        if isinstance(value, dict):
            value = [f"{key}={'null' if item is None else item}" for key, item in value.items()]
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def checksum(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
