"""A small comparison of objectives: the YAML of the repository with models that take seconds."""

import yaml

from tests.conftest import ROOT, TINY

YAML = ROOT / "scripts/benchmarks/objectives.yaml"
TUNED = ROOT / "scripts/benchmarks/tuned.yaml"
MINUTES = "0.1"


def small_config(scripts, tmp_path, **changes):
    """The YAML of the repository with models and lengths that take seconds."""
    config = yaml.safe_load(YAML.read_text())
    config["pretraining"] |= {"encoder_options": TINY, "bf16": False}
    config["finetuning"] |= {"bf16": False, "learning_rate": 1e-3}
    config["timed_updates"] = [1, 3]
    config["few_shot"] = {"splits": ["test"], "n_way": 2, "k_shot": 1, "n_query": 1, "min_clips": 2, "episodes": 20}
    config["arms"]["scratch"].pop("finetuning")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": 16,
    }
    config["arms"]["transformers_wav2vec2"]["pretraining"] |= {"max_seconds_per_batch": 4, "bf16": False, **sizes}
    halves = [{"share": 0.5}, {"share": 0.5, "continues": True}]
    config["arms"]["best_rq_in_halves"] = {"like": "best_rq", "stages": halves}
    for arm in ("hubert", "hubert+best_rq", "hubert+best_rq_near", "hubert_2"):
        for stage in config["arms"][arm]["stages"]:
            stage["units"] |= {"num_units": 5, "layer": 1} if "layer" in stage["units"] else {"num_units": 10}
    for arm in ("hubert+best_rq_self_trained", "scratch_self_trained"):
        config["arms"][arm]["self_training"] = {
            "rounds": 2,
            "student": {"max_steps": 4},
            "last": {"max_steps": 3},
        }
        del config["arms"][arm]["tiers"]  # by label sizes that are not here
    for name in ("T1", "T2", "T3"):
        tier = config["tiers"][name]
        tier |= {
            "threads": 1,
            "device": "cpu",
            "labels": {"dev": [float(MINUTES), "all"], "final": [float(MINUTES), "all"]},
        }
        tier["pretraining"] = {"max_steps": 2, "max_seconds_per_batch": 6}
        tier["finetuning"] = {"max_steps": 5, "max_seconds_per_batch": 6}
        tier.pop("finetuning_by_labels", None)
    config.update(changes)
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return scripts.recipes.read_config(file), file
