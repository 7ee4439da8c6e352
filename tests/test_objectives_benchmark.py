"""The comparison of objectives: its data and plan, and whole chains on a corpus made of the embedded clips."""

import importlib
import itertools
import json
import shutil
import threading
import time

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import pipeline

from hf_speechcl import load_corpus
from hf_speechcl.evaluation.evaluate import main as evaluate
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.make_pseudo_labels import main as make_pseudo_labels
from hf_speechcl.training.make_units import main as make_units
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import ROOT, TINY

YAML = ROOT / "scripts/benchmarks/objectives.yaml"
MINUTES = "0.1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the columns of the real one, of short clips of the embedded corpus."""
    folder = tmp_path_factory.mktemp("shared")
    clips = [row for row in load_corpus("demo").to_list() if 0.6 < row["duration"] < 2.0 and len(row["text"]) > 3][:80]

    def write(name, rows, **columns):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        table = {key: [row[key] for row in rows] for key in ("audio", "text")}
        table["id"] = [f"{name}/{row['id']}" for row in rows]
        table["speaker"] = [f"voice {number % 2}" for number in range(len(rows))]
        table["duration"] = pyarrow.array([row["duration"] for row in rows], pyarrow.float32())
        pyarrow.parquet.write_table(pyarrow.table(table | columns), file)

    def phones(rows):
        labels = [["pau", *(letter * 2 for letter in row["text"].lower() if letter.isalpha())] for row in rows]
        ends = [
            [row["duration"] * place / len(found) for place in range(1, len(found) + 1)]
            for row, found in zip(rows, labels)
        ]
        return {"phones": labels, "phone_ends": ends}

    write("pool/train-0.parquet", clips[:12], source=["festvox-ru"] * 8 + ["other"] + ["asterisk-core-sounds-fr"] * 3)
    write("phones_ru/train.parquet", clips[:60], **phones(clips[:60]))
    write("phones_ru/test.parquet", clips[60:64], **phones(clips[60:64]))
    for name in ("prompts_en", "queen_en"):
        write(f"{name}/train.parquet", clips[:20])
        write(f"{name}/validation.parquet", clips[64:70])
        write(f"{name}/test.parquet", clips[70:])
    return folder


def ids(corpus, split="train"):
    return pyarrow.parquet.read_table(f"{corpus}/{split}.parquet")["id"].to_pylist()


def small_config(scripts, tmp_path, **changes):
    """The YAML of the repository with models and lengths that take seconds."""
    config = yaml.safe_load(YAML.read_text())
    config["pretraining"] |= {"encoder_options": TINY, "bf16": False}
    config["finetuning"] |= {"bf16": False, "learning_rate": 1e-3}
    config["few_shot"] = {"splits": ["test"], "n_way": 2, "k_shot": 1, "n_query": 1, "min_clips": 2, "episodes": 20}
    config["arms"]["scratch"].pop("finetuning")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": 16,
    }
    config["arms"]["transformers_wav2vec2"]["pretraining"] = {"seconds": 0.1, "max_seconds_per_batch": 4, **sizes}
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


# Data


def test_phones_are_letters_in_the_order_of_their_symbols(scripts):
    assert scripts.tiers.letters_of([["pau", "tt", "a"], ["a", "pau", "t"]]) == {"a": "a", "t": "b", "tt": "c"}
    with pytest.raises(ValueError, match="phones: 59 different ones"):
        scripts.tiers.letters_of([[str(number) for number in range(59)]])


def test_first_tier_is_the_one_speaker_with_phones_as_text(scripts, data, tmp_path):
    tier = scripts.tiers.TierData("T1", data, tmp_path)
    (unlabelled,) = tier.unlabelled
    assert len(ids(unlabelled)) == 8
    labels = tier.labels("final", "all", 0)
    assert labels.minutes * 60 == pytest.approx(sum(load_corpus(labels.corpus)["duration"]), rel=1e-6)
    letters = json.loads((tmp_path / "T1/sources/phones.json").read_text())
    source = pyarrow.parquet.read_table(data / "phones_ru/train.parquet").to_pylist()
    phones = {row["id"]: row["phones"] for row in source}
    for row in load_corpus(labels.corpus):
        assert row["text"] == "".join(letters[phone] for phone in phones[row["id"]] if phone != "pau")


def test_development_labels_hold_no_validation_clip_and_final_ones_are_of_all(scripts, data, tmp_path):
    tier = scripts.tiers.TierData("T1", data, tmp_path)
    dev, final = (tier.labels(phase, "all", 0) for phase in ("dev", "final"))
    validation = ids(dev.corpus, "validation")
    assert len(validation) == 40
    assert not set(validation) & set(ids(dev.corpus))
    assert set(ids(final.corpus)) == set(validation) | set(ids(dev.corpus))
    assert dev.scored == (dev.corpus, "validation")
    assert dev.held_out
    assert final.scored[1] == "test"
    assert not final.held_out


def test_label_sets_are_drawn_by_seed_and_nested(scripts, data, tmp_path):
    def drawn(folder, size, seed):
        labels = scripts.tiers.TierData("T2", data, tmp_path / folder).labels("final", size, seed)
        return ids(labels.corpus), labels.minutes

    few, few_minutes = drawn("a", "0.1", 0)
    more, _ = drawn("a", "0.2", 0)
    assert set(few) < set(more)
    assert few_minutes >= 0.1
    assert drawn("b", "0.1", 0)[0] == few
    assert drawn("a", "0.1", 1)[0] != few
    with pytest.raises(ValueError, match="labels: 90 minutes were asked for and there are"):
        drawn("a", "90", 0)


def test_larger_tiers_take_their_audio_from_where_it_is(scripts, data, tmp_path):
    tier = scripts.tiers.TierData("T3", data, tmp_path)
    assert tier.unlabelled == [str(data / name) for name in ("pool", "prompts_en", "queen_en")]
    assert tier.labels("final", "all", 0).corpus == str(data / "queen_en")
    assert not (tmp_path / "T3").exists()


def test_audio_like_that_of_the_labels(scripts, data, tmp_path):
    one_voice, prompts, characters = (scripts.tiers.TierData(name, data, tmp_path) for name in ("T1", "T2", "T3"))
    assert one_voice.near == one_voice.unlabelled
    assert characters.near == [str(data / "queen_en")]
    labelled, of_pool = prompts.near
    assert labelled == str(data / "prompts_en")
    pool = pyarrow.parquet.read_table(data / "pool/train-0.parquet").to_pylist()
    assert ids(of_pool) == [row["id"] for row in pool if row["source"] == "asterisk-core-sounds-fr"]


def test_a_pool_without_a_source_is_refused(scripts, data, tmp_path):
    table = pyarrow.parquet.read_table(data / "pool/train-0.parquet")
    shutil.copytree(data, tmp_path / "data")
    pyarrow.parquet.write_table(table.slice(0, 8), tmp_path / "data/pool/train-0.parquet")
    with pytest.raises(ValueError, match="pool has no audio whose source begins with asterisk"):
        scripts.tiers.TierData("T2", tmp_path / "data", tmp_path / "made")


def test_test_clips_in_the_pool_are_refused(scripts, data, tmp_path):
    table = pyarrow.parquet.read_table(data / "phones_ru/test.parquet")
    pool = pyarrow.parquet.read_table(data / "pool/train-0.parquet")
    name = pool["id"][0].as_py()
    mixed = tmp_path / "mixed"
    (mixed / "phones_ru").mkdir(parents=True)
    (mixed / "pool").symlink_to(data / "pool")
    (mixed / "queen_en").symlink_to(data / "queen_en")
    changed = table.set_column(table.column_names.index("id"), "id", pyarrow.array([name] * len(table)))
    pyarrow.parquet.write_table(changed, mixed / "phones_ru/test.parquet")
    (mixed / "phones_ru/train.parquet").symlink_to(data / "phones_ru/train.parquet")
    with pytest.raises(ValueError, match="1 test clips of phones_ru are in the pool"):
        scripts.tiers.TierData("T1", mixed, tmp_path / "out")
    assert not (tmp_path / "out/T1/sources").exists()


# Recipes and plan


def test_options_of_an_arm_go_over_those_of_its_tier_and_of_all(scripts, tmp_path):
    config, _ = small_config(scripts, tmp_path)
    config["finetuning_by_labels"] = {"all": {"head_learning_rate": 7}}
    config["arms"]["mine"] = {
        "like": "best_rq",
        "pretraining": {"objective_options": {"best_rq.num_codebooks": 2}, "mask_span": None},
        "finetuning": {"learning_rate": 3},
        "tiers": {"T1": {"finetuning": {"learning_rate": 4}}},
    }
    recipe = scripts.recipes.build_recipe(config, "T1", "mine", [MINUTES, "all"])
    (stage,) = recipe.stages
    options = stage["pretraining"]
    assert options["objective_options"] == {"best_rq.num_codebooks": 2, "best_rq.codebook_size": 64}
    assert options["max_steps"] == 2
    assert "mask_span" not in options
    config["arms"]["plain"] = {"like": "mine", "finetuning": None}
    plain = scripts.recipes.build_recipe(config, "T2", "plain", [MINUTES])
    assert plain.finetuning[MINUTES]["learning_rate"] == config["finetuning"]["learning_rate"]
    assert "mask_span" not in plain.stages[0]["pretraining"]
    assert recipe.finetuning[MINUTES]["learning_rate"] == recipe.finetuning["all"]["learning_rate"] == 4
    assert recipe.finetuning["all"]["head_learning_rate"] == 7
    assert recipe.finetuning[MINUTES]["head_learning_rate"] != 7
    other = scripts.recipes.build_recipe(config, "T2", "mine", ["all"])
    assert other.finetuning["all"]["learning_rate"] == 3


def test_two_iterations_share_the_updates_of_one(scripts):
    config = scripts.recipes.read_config(YAML)
    one, two = (scripts.recipes.build_recipe(config, "T1", arm, ["3"]) for arm in ("hubert", "hubert_2"))
    assert one.updates == two.updates
    assert [stage["pretraining"]["max_steps"] / two.updates for stage in two.stages] == pytest.approx([0.4, 0.6])


def test_every_arm_of_the_yaml_is_a_recipe_in_every_tier(scripts):
    config = scripts.recipes.read_config(YAML)
    for tier, options in config["tiers"].items():
        for arm in config["arms"]:
            for phase in ("dev", "final"):
                sizes = list(map(str, options["labels"][phase]))
                recipe = scripts.recipes.build_recipe(config, tier, arm, sizes)
                assert all("max_steps" in recipe.finetuning[size] for size in sizes)
    for arm in config["quick"]["arms"]:
        recipe = scripts.recipes.build_recipe(config, "T1", arm, ["10"], quick=True)
        assert recipe.updates in (0, config["quick"]["pretraining"]["max_steps"])


def test_options_stand_on_the_command_line_as_the_scripts_read_them(scripts):
    options = {"encoder_options": {"a": 1, "b": None}, "bf16": True, "corpus": ["x", "y"], "seed": 3}
    expected = "--encoder_options a=1 b=null --bf16 True --corpus x y --seed 3"
    assert scripts.recipes.to_argv(options) == expected.split()


def test_unknown_names_in_the_yaml_are_refused(scripts, tmp_path):
    with pytest.raises(ValueError, match=r"arms.x: unknown pretrainig"):
        small_config(scripts, tmp_path, arms={"x": {"pretrainig": {}}})
    parts = {"rounds": 1, "student": {}, "last": {}}
    with pytest.raises(ValueError, match=r"arms.x: self-training starts from the encoder of another arm"):
        small_config(scripts, tmp_path, arms={"x": {"self_training": parts}})
    arms = {"x": {}, "y": {"like": "x", "self_training": parts}, "z": {"like": "y", "pretraining": {}}}
    with pytest.raises(ValueError, match=r"arms.z: self-training starts from the encoder of another arm"):
        small_config(scripts, tmp_path, arms=arms, reference_arm="x")
    with pytest.raises(ValueError, match=r"arms.y.self_training: last, student is missing"):
        small_config(scripts, tmp_path, arms={"x": {}, "y": {"like": "x", "self_training": {"rounds": 1}}})
    with pytest.raises(ValueError, match=r"arms.x: it changes self_training, which it does not have"):
        small_config(scripts, tmp_path, arms={"x": {"tiers": {"T1": {"self_training_by_labels": {"all": {}}}}}})
    changes = {
        r"arms.y.tiers: there is no tier 'T9'": {"T9": {}},
        r"arms.y.tiers.T1: unknown self_training_by_label;": {"T1": {"self_training_by_label": {}}},
        r"by_labels: there is no label size '1O'; expected 0.1, all": {"T1": {"self_training_by_labels": {"1O": {}}}},
        r"T1.self_training_by_labels.all: unknown round;": {"T1": {"self_training_by_labels": {"all": {"round": 2}}}},
        r"T2.finetuning_by_labels: there is no label size 3": {"T2": {"finetuning_by_labels": {3: {}}}},
    }
    for message, of_tiers in changes.items():
        arms = {"x": {}, "y": {"like": "x", "self_training": parts, "tiers": of_tiers}}
        with pytest.raises(ValueError, match=message):
            small_config(scripts, tmp_path, arms=arms, reference_arm="x")
    with pytest.raises(ValueError, match="reference_arm: there is no arm 'y'"):
        small_config(scripts, tmp_path, reference_arm="y")


def plan(scripts, config, tmp_path, rows=(), **options):
    args = scripts.objectives.ComparisonArguments(**options)
    return scripts.objectives.plan(args, config, list(rows), tmp_path / "out")


def test_plan_leaves_out_what_has_a_row_and_makes_what_changed_anew(scripts, tmp_path):
    config, _ = small_config(scripts, tmp_path)
    (chain,) = plan(scripts, config, tmp_path, arms=["best_rq"])
    assert chain.sizes == [MINUTES, "all"]
    rows = [{"run": chain.run_name("all")}]
    (again,) = plan(scripts, config, tmp_path, rows, arms=["best_rq"])
    assert again.sizes == [MINUTES]
    assert again.folder == chain.folder
    config["arms"]["best_rq"]["pretraining"]["mask_prob"] = 0.9
    (changed,) = plan(scripts, config, tmp_path, rows, arms=["best_rq"])
    assert changed.sizes == [MINUTES, "all"]
    assert changed.folder != chain.folder


def test_table_of_equal_time_leaves_out_what_is_the_same_in_both(scripts, tmp_path):
    config, _ = small_config(scripts, tmp_path)
    arms = {chain.recipe.arm for chain in plan(scripts, config, tmp_path, table="time")}
    without_pretraining = {"scratch", "scratch_whole", "frozen_random", "log_mel"}
    same = {"hubert+best_rq", "transformers_wav2vec2"}
    of_own_length = {"hubert+best_rq_quarter", "hubert+best_rq_fourfold", "hubert+best_rq_near"}
    of_own_length |= {"hubert+best_rq_self_trained", "scratch_self_trained"}
    assert arms == set(config["arms"]) - without_pretraining - same - of_own_length


def test_self_training_shares_the_encoder_of_another_arm_and_may_differ_by_tier_and_by_labels(scripts):
    config = scripts.recipes.read_config(YAML)
    config["arms"]["mine"] = {"like": "hubert+best_rq_self_trained", "finetuning": {"learning_rate": 1}}
    sizes = ["3", "10", "all"]
    recipes = [scripts.recipes.build_recipe(config, tier, "mine", sizes) for tier in ("T1", "T3")]
    assert {recipe.encoder_arm for recipe in recipes} == {"hubert+best_rq"}
    assert [recipe.self_training[size]["rounds"] for recipe in recipes for size in sizes] == [3, 2, 2, 2, 2, 2]
    updates = [recipe.self_training[size]["student"]["max_steps"] for recipe in recipes for size in sizes]
    assert updates == [2500, 4000, 4500, 2500, 2500, 2500]
    assert json.loads(recipes[0].to_json("10"))["self_training"] == recipes[0].self_training["10"]
    other = scripts.recipes.build_recipe(config, "T1", "hubert+best_rq", ["all"])
    assert other.self_training is None
    assert other.is_teacher
    assert not recipes[0].is_teacher


def test_an_arm_may_be_longer_than_others(scripts):
    config = scripts.recipes.read_config(YAML)
    arms = ("hubert+best_rq_quarter", "hubert+best_rq", "hubert+best_rq_fourfold")
    assert [scripts.recipes.build_recipe(config, "T1", arm, ["3"]).updates for arm in arms] == [1000, 4000, 16000]


def test_what_is_asked_for_twice_is_planned_once(scripts, tmp_path):
    config, _ = small_config(scripts, tmp_path)
    twice = {"tiers": ["T1", "T1"], "arms": ["best_rq", "best_rq"], "labels": ["all", "all"], "seeds": [0, 0]}
    (chain,) = plan(scripts, config, tmp_path, **twice)
    assert chain.sizes == ["all"]


def test_plan_refuses_what_the_yaml_does_not_have(scripts, tmp_path):
    config, _ = small_config(scripts, tmp_path)
    for name, message in (("tiers", "tiers: expected of T1"), ("arms", "arms: expected of"), ("labels", "labels: exp")):
        with pytest.raises(ValueError, match=message):
            plan(scripts, config, tmp_path, **{name: ["nothing"]})


# Processes


def test_a_process_is_measured_and_its_end_is_shown_when_it_fails(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.processes, "SCRIPTS", tmp_path)
    (tmp_path / "busy.py").write_text(
        "import os, time\nwhile time.process_time() < 0.3: pass\nprint(os.environ['OMP_NUM_THREADS'])"
    )
    (tmp_path / "fails.py").write_text("print('why')\nraise SystemExit(3)")
    processes, only_one = scripts.processes.Processes(threads=1), scripts.processes.only_one
    with only_one(tmp_path / "run/lock") as lock:
        took = processes.run("busy.py", [], tmp_path / "busy.log", lock)
        with pytest.raises(scripts.processes.RunError, match="fails.py ended with 3(?s:.*)why"):
            processes.run("fails.py", [], tmp_path / "fails.log", lock)
        with (
            pytest.raises(scripts.processes.RunError, match="another process"),
            scripts.processes.only_one(tmp_path / "run/lock"),
        ):
            pass
    assert 0.3 <= took["cpu_seconds"] < 10
    assert took["wall_seconds"] >= 0.3
    assert (tmp_path / "busy.log").read_text() == "1\n"


def test_data_that_another_process_made_first_is_taken(scripts, tmp_path):
    def make(folder):
        (folder / "file").write_text("mine")
        (tmp_path / "made").mkdir()
        (tmp_path / "made/file").write_text("of another")

    scripts.tiers.make_once(tmp_path / "made", make)
    assert (tmp_path / "made/file").read_text() == "of another"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


class FakeProcesses(dict):
    """Runs scripts in this process; those named in `failing` end with an error."""

    def __init__(self, scripts, failing=()):
        self.scripts, self.failing, self.calls = scripts, failing, []

    def __missing__(self, tier):
        return self

    def stop(self):
        pass

    def run(self, script, argv, log, keep_open):
        self.calls.append((script, argv))
        if script in self.failing:
            raise self.scripts.processes.RunError(f"{script} ended with 1")
        mains = {"pretrain.py": pretrain, "finetune_ctc.py": finetune_ctc, "evaluate.py": evaluate}
        mains |= {"make_units.py": make_units, "make_pseudo_labels.py": make_pseudo_labels}
        mains["benchmarks/peer.py"] = self.scripts.peer.main
        mains["benchmarks/few_shot.py"] = self.scripts.few_shot.main
        mains[script](argv)
        return {"wall_seconds": 20.0, "cpu_seconds": 1.0 if script.startswith("make_") else 10.0}


def test_seconds_of_a_resumed_run_are_in_proportion_to_its_updates(scripts, tmp_path):
    checkpoint = tmp_path / "stage1/checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    log = [{"step": step, "loss": 11.0 - step, "audio_hours": step / 10} for step in range(1, 11)]

    class Resumed:
        def run(self, script, argv, log_file, keep_open):
            model = {"weight": torch.zeros(3, 4), "bias": torch.zeros(5)}
            importlib.import_module("safetensors.torch").save_file(model, tmp_path / "stage1/model.safetensors")
            (tmp_path / "stage1/trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": log}))
            return {"wall_seconds": 14.0, "cpu_seconds": 7.0}

    took = scripts.processes.train(Resumed(), "pretrain.py", tmp_path / "stage1", [], 5, 0)
    assert took == {
        "wall_seconds": pytest.approx(20),
        "cpu_seconds": pytest.approx(10),
        "updates": 10,
        "audio_hours": 1.0,
        "loss_before": 3.5,
        "loss_last": 1.5,
        "parameters": 17,
        "resumed": True,
    }
    assert not checkpoint.exists()
    assert scripts.processes.train(None, "pretrain.py", tmp_path / "stage1", [], 5, 0) == took


# Whole chains


def options_of(argv):
    """The first value of every option of a command line."""
    return {name[2:]: value for name, value in zip(argv, argv[1:]) if name.startswith("--")}


@pytest.fixture
def compare(scripts, data, tmp_path, monkeypatch):
    """Runs the front door with tiny models; the processes, and what it returned."""
    config, file = small_config(scripts, tmp_path)

    def run(*options, failing=()):
        processes = FakeProcesses(scripts, failing)
        original = scripts.chains.Comparison.__init__

        def start(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.processes = processes

        with monkeypatch.context() as patched:
            patched.setattr(scripts.chains.Comparison, "__init__", start)
            argv = ["--config", str(file), "--data", str(data), "--output_dir", str(tmp_path / "out"), *options]
            return processes, scripts.objectives.main(argv)

    run.rows = lambda: scripts.processes.Results(tmp_path / "out/results.parquet").rows()
    run.folder = tmp_path / "out"
    return run


def test_an_arm_hears_only_audio_like_that_of_the_labels(compare, scripts, data):
    processes, code = compare("--tiers", "T2", "--arms", "hubert+best_rq_near", "--labels", MINUTES)
    assert code == 0
    near = scripts.tiers.TierData("T2", data, compare.folder / "data").near
    for script, argv in processes.calls[:2]:
        heard = itertools.takewhile(lambda value: not value.startswith("--"), argv[argv.index("--corpus") + 1 :])
        assert list(heard) == near, script
    assert [script for script, _ in processes.calls[:2]] == ["make_units.py", "pretrain.py"]


def test_chains_end_in_rows_and_a_report_and_are_not_run_again(compare, capsys):
    arms = [
        "--arms",
        "scratch",
        "frozen_random",
        "log_mel",
        "best_rq",
        "hubert+best_rq",
        "hubert_2",
        "hubert+best_rq_self_trained",
        "scratch_self_trained",
        "scratch_whole",
        "transformers_wav2vec2",
        "best_rq_in_halves",
    ]
    options = [*arms, "--phase", "dev", "--labels", "all"]
    processes, code = compare(*options)
    assert code == 0
    rows = {row["arm"]: row for row in compare.rows()}
    assert set(rows) == set(arms[1:])
    row = rows["best_rq"]
    assert row["cer"] == pytest.approx(sum(row["cer_edits"]) / sum(row["cer_lengths"]))
    assert len(row["clips"]) == len(row["cer_edits"]) == 40
    assert row["validation_cer"] == pytest.approx(row["cer"], abs=0.1)  # of clips whose phones train has
    assert (row["updates"], row["finetuning_updates"]) == (2, 5)
    assert 0.3 < row["few_shot"] <= 1  # of two speakers
    assert rows["scratch"]["few_shot"] is None
    assert (row["pretraining_cpu_seconds"], row["pretraining_wall_seconds"]) == (10, 20)
    assert rows["hubert_2"]["pretraining_cpu_seconds"] == 2 * (10 + 1)
    assert rows["hubert_2"]["updates"] == 2
    # The encoder of the other arm, a teacher, and twice texts and a student; from scratch all but the encoder.
    assert rows["hubert+best_rq_self_trained"]["pretraining_cpu_seconds"] == (10 + 1) + 10 + 2 * (1 + 10)
    assert rows["scratch_self_trained"]["pretraining_cpu_seconds"] == 10 + 2 * (1 + 10)
    assert rows["hubert+best_rq_self_trained"]["updates"] == 2 + 5 + 2 * 4
    assert rows["hubert+best_rq_self_trained"]["finetuning_updates"] == 3
    assert rows["scratch_self_trained"]["few_shot"] is None
    encoder = str(next(compare.folder.glob("runs/T1/hubert+best_rq/*/stage1")))
    steps = [
        options_of(argv)
        for script, argv in processes.calls
        if script == "finetune_ctc.py" and "/hubert+best_rq" in options_of(argv)["output_dir"]
    ]
    made = [own["output_dir"] for own in steps]
    assert ["_self_trained/" in folder for folder in made] == [False, True, True, True]
    assert [own["model"] for own in steps] == [encoder, encoder, made[1], made[2]]
    assert [own["max_steps"] for own in steps] == ["5", "4", "4", "3"]
    calls = [options_of(argv) for script, argv in processes.calls if script == "make_pseudo_labels.py"]
    written = [own for own in calls if "/hubert+best_rq_self_trained/" in own["output_dir"]]
    assert [own["model"] for own in written] == [made[0], made[1]]
    texts = [own["output_dir"] for own in written]
    assert [own.get("pseudo_labels") for own in steps] == [None, *texts, None]
    assert rows["best_rq_in_halves"]["pretraining_cpu_seconds"] == 2 * 10
    (goes_on,) = [argv for script, argv in processes.calls if script == "pretrain.py" and argv[1].endswith("stage1")]
    assert "--encoder_options" not in goes_on
    assert rows["scratch"]["updates"] == 0
    assert rows["scratch_whole"]["finetuning_updates"] == 5 + round(5 * (10 + 1) / 10)
    assert rows["transformers_wav2vec2"]["updates"] >= 1
    assert rows["log_mel"]["parameters"] < rows["scratch"]["parameters"]
    assert not list(compare.folder.glob("runs/**/checkpoint-*"))
    kept = [file.relative_to(compare.folder / "runs/T1") for file in compare.folder.glob("runs/**/model.safetensors")]
    assert {file.parts[0] for file in kept if not file.parts[2].startswith("stage")} == {"hubert+best_rq", "scratch"}
    report = (compare.folder / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert "| best_rq | " in report
    assert "| scratch_self_trained ‡ | " in report
    for kind in ("labels", "hours", "compute"):
        assert (compare.folder / f"T1_dev_updates_cer_{kind}.png").read_bytes().startswith(b"\x89PNG")
    processes, code = compare(*options)
    assert (processes.calls, code) == ([], 0)


def test_a_teacher_is_the_model_of_its_arm_and_trained_anew_if_that_was_deleted(compare):
    options = ["--phase", "dev", "--labels", MINUTES]
    assert compare("--arms", "scratch_self_trained", *options)[1] == 0
    processes, code = compare("--arms", "scratch", *options)
    assert code == 0
    assert [script for script, _ in processes.calls] == ["evaluate.py"]
    (teacher,) = compare.folder.glob("runs/T1/scratch/*/dev*/model.safetensors")
    weights = teacher.read_bytes()
    teacher.unlink()
    for folder in compare.folder.glob("runs/T1/scratch_self_trained/*"):
        shutil.rmtree(folder)
    (compare.folder / "results.parquet").unlink()
    processes, code = compare("--arms", "scratch_self_trained", *options)
    assert code == 0
    assert [script for script, _ in processes.calls].count("finetune_ctc.py") == 1 + 2 + 1
    assert teacher.read_bytes() == weights


def test_scratch_has_the_encoder_that_others_pretrain(compare):
    processes, _ = compare("--arms", "scratch", "best_rq", "--labels", MINUTES)
    by_arm = {row["arm"]: row for row in compare.rows()}
    assert by_arm["scratch"]["parameters"] == by_arm["best_rq"]["parameters"]
    assert by_arm["scratch"]["validation_cer"] is None
    assert len(by_arm["scratch"]["clips"]) == 4


def test_a_failing_run_is_counted_and_the_others_go_on(compare, caplog):
    _, code = compare("--arms", "best_rq", "scratch", "--labels", MINUTES, failing=["pretrain.py"])
    assert code == 1
    assert [row["arm"] for row in compare.rows()] == ["scratch"]
    assert f"failed: best_rq seed 0, labels {MINUTES}. pretrain.py ended with 1" in caplog.text
    processes, code = compare("--arms", "best_rq", "scratch", "--labels", MINUTES)
    assert code == 0
    scripts = [script for script, _ in processes.calls]
    assert scripts == ["pretrain.py", "finetune_ctc.py", "evaluate.py", "benchmarks/few_shot.py"]


class FakeComparison:
    """Says what is run at once; encoders of seed `fails` are not made, nor is the label size "60" of any."""

    def __init__(self, fails):
        self.fails, self.made, self.finished, self.together, self.running = fails, [], [], 0, 0
        self.lock = threading.Lock()

    def encoder_folder(self, chain):
        return chain.folder.with_name(f"encoder{chain.seed}")

    def make_encoder(self, chain):
        self.made.append(chain.seed)
        if chain.seed == self.fails:
            raise RuntimeError("no encoder")
        return f"encoder{chain.seed}", {"updates": 7}

    def finish(self, chain, size, encoder, took):
        with self.lock:
            self.running += 1
            self.together = max(self.together, self.running)
        time.sleep(0.05)
        with self.lock:
            self.running -= 1
        if size == "60":
            raise RuntimeError("no row")
        self.finished.append((chain.recipe.arm, chain.seed, size, encoder, took["updates"]))


def test_label_sizes_of_all_arms_with_an_encoder_are_run_side_by_side(scripts, tmp_path, caplog):
    config = scripts.recipes.read_config(YAML)
    arms = ("hubert+best_rq", "hubert+best_rq_self_trained", "scratch")
    chains = [
        scripts.chains.Chain(
            scripts.recipes.build_recipe(config, "T3", arm, ["10", "60"]),
            seed,
            "updates",
            "dev",
            tmp_path,
            ["10", "60"],
        )
        for seed in (0, 1)
        for arm in arms
    ]
    comparison = FakeComparison(fails=1)
    assert scripts.objectives.run_all(comparison, chains, 3) == 3 + 3 * 2
    assert sorted(comparison.made) == [0, 1]
    assert sorted(comparison.finished) == [(arm, 0, "10", "encoder0", 7) for arm in sorted(arms)]
    assert comparison.together == 3
    assert "failed: scratch seed 1, labels 10, 60. no encoder" in caplog.text
    assert "failed: scratch seed 0, labels 60. no row" in caplog.text


def test_equal_time_is_measured_in_rows_that_must_be_there(compare, caplog):
    options = ["--arms", "denoising", "--labels", MINUTES]
    _, code = compare(*options, "--table", "time")
    assert code == 1
    assert "run --arms denoising --table updates first" in caplog.text
    assert compare("--arms", "denoising", "hubert+best_rq", "--labels", MINUTES)[1] == 0
    _, code = compare(*options, "--table", "time")
    assert code == 0
    assert [row["updates"] for row in compare.rows() if row["table"] == "time"] == [2]
    assert "another machine" not in caplog.text


def test_time_of_another_device_is_no_measure(compare, scripts, caplog):
    assert compare("--arms", "denoising", "hubert+best_rq", "--labels", MINUTES)[1] == 0
    results = scripts.processes.Results(compare.folder / "results.parquet")
    rows, options = results.rows(), ["--arms", "denoising", "--labels", MINUTES, "--table", "time"]
    for row in rows:
        assert row["device"] == "cpu"
        results.add(row | {"device": "cuda"})
    assert compare(*options)[1] == 1
    assert "run --arms denoising --table updates first" in caplog.text
    for row in rows:
        results.add(row | {"machine": "2026-11-27, a slower one"})
    assert compare(*options)[1] == 0
    assert "denoising: its length is measured in time of another machine: a slower one" in caplog.text


def test_dry_run_prints_the_plan_and_runs_nothing(compare, capsys):
    processes, code = compare("--arms", "best_rq", "scratch_whole", "--dry_run", "True")
    printed = capsys.readouterr().out
    assert (processes.calls, code) == ([], 0)
    assert f"| T1 | best_rq | 0 | 2 | {MINUTES}: 5, all: 5 | 0 |" in printed
    assert "by rows to come" in printed
    assert "4 runs to be made" in printed


# The peer

SMALL_PEER = (
    "--hidden_size 32 --num_hidden_layers 2 --num_attention_heads 2 --intermediate_size 64 --conv_dim 16 "
    "--use_cpu True --max_seconds_per_batch 4 --logging_steps 1 --save_steps 2"
).split()


def test_peer_resumes_exactly_and_is_fine_tuned_to_a_recognizer(scripts, data, tmp_path, clips):
    folder, corpus = tmp_path / "peer", str(data / "prompts_en")
    argv = ["pretrain", "--corpus", corpus, "--max_steps", "4", "--output_dir", str(folder), *SMALL_PEER]
    scripts.peer.main(argv)
    whole = load_file(folder / "model.safetensors")
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    (folder / "model.safetensors").unlink()
    scripts.peer.main([*argv, "--resume_from_checkpoint", "last"])
    resumed = load_file(folder / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((folder / "trainer_state.json").read_text())["log_history"] == log
    assert 0 < log[0]["audio_hours"] < log[-1]["audio_hours"]

    argv = "--max_steps 2 --use_cpu --eval_strategy no --save_strategy no --report_to none --max_seconds_per_batch 6"
    recognizer = tmp_path / "ctc"
    scripts.peer.main(
        ["finetune", "--model", str(folder), "--corpus", corpus, "--output_dir", str(recognizer), *argv.split()]
    )
    trained, conv = load_file(recognizer / "model.safetensors"), "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
    assert torch.equal(trained[conv], resumed[conv])
    assert "text" in pipeline("automatic-speech-recognition", model=str(recognizer))(clips[2])


def test_peer_stops_when_its_time_is_spent(scripts, data, tmp_path, monkeypatch):
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(scripts.peer.time, "process_time", lambda: float(next(times)))
    argv = ["pretrain", "--corpus", str(data / "prompts_en"), "--seconds", "30", "--output_dir", str(tmp_path)]
    scripts.peer.main([*argv, *SMALL_PEER])
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 3


def test_peer_normalizes_clips_as_its_feature_extractor(scripts):
    clips = [torch.randn(900) * 3 + 1, torch.randn(700)]
    values = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    mask = torch.arange(900) < torch.tensor([[900], [700]])
    extractor = scripts.peer.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor([clip.numpy() for clip in clips], sampling_rate=16000, padding=True, return_tensors="pt")
    torch.testing.assert_close(scripts.peer.normalize(values, mask), expected["input_values"], atol=1e-5, rtol=1e-4)
