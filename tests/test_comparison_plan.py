"""The comparison of objectives: its data, its recipes and its plan."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from hf_speechcl import load_corpus
from tests.comparison import MINUTES, TUNED, YAML, small_config


def ids(corpus, split="train"):
    return pyarrow.parquet.read_table(f"{corpus}/{split}.parquet")["id"].to_pylist()


# Data


def test_phones_are_letters_in_the_order_of_their_symbols(scripts):
    assert scripts.tiers.letters_of([["pau", "tt", "a"], ["a", "pau", "t"]]) == {"a": "a", "t": "b", "tt": "c"}
    with pytest.raises(ValueError, match="phones: 59 different ones"):
        scripts.tiers.letters_of([[str(number) for number in range(59)]])


def test_first_tier_is_the_one_speaker_with_phones_as_text(scripts, small_data, tmp_path):
    tier = scripts.tiers.TierData("T1", small_data, tmp_path)
    (unlabelled,) = tier.unlabelled
    assert len(ids(unlabelled)) == 8
    labels = tier.labels("final", "all", 0)
    assert labels.minutes * 60 == pytest.approx(sum(load_corpus(labels.corpus)["duration"]), rel=1e-6)
    letters = json.loads((tmp_path / "T1/sources/phones.json").read_text())
    source = pyarrow.parquet.read_table(small_data / "phones_ru/train.parquet").to_pylist()
    phones = {row["id"]: row["phones"] for row in source}
    for row in load_corpus(labels.corpus):
        assert row["text"] == "".join(letters[phone] for phone in phones[row["id"]] if phone != "pau")


def test_development_labels_hold_no_validation_clip_and_final_ones_are_of_all(scripts, small_data, tmp_path):
    tier = scripts.tiers.TierData("T1", small_data, tmp_path)
    dev, final = (tier.labels(phase, "all", 0) for phase in ("dev", "final"))
    validation = ids(dev.corpus, "validation")
    assert len(validation) == 40
    assert not set(validation) & set(ids(dev.corpus))
    assert set(ids(final.corpus)) == set(validation) | set(ids(dev.corpus))
    assert dev.scored == (dev.corpus, "validation")
    assert dev.held_out
    assert final.scored[1] == "test"
    assert not final.held_out


def test_label_sets_are_drawn_by_seed_and_nested(scripts, small_data, tmp_path):
    def drawn(folder, size, seed):
        labels = scripts.tiers.TierData("T2", small_data, tmp_path / folder).labels("final", size, seed)
        return ids(labels.corpus), labels.minutes

    few, few_minutes = drawn("a", "0.1", 0)
    more, _ = drawn("a", "0.2", 0)
    assert set(few) < set(more)
    assert few_minutes >= 0.1
    assert drawn("b", "0.1", 0)[0] == few
    assert drawn("a", "0.1", 1)[0] != few
    with pytest.raises(ValueError, match="labels: 90 minutes were asked for and there are"):
        drawn("a", "90", 0)


def test_larger_tiers_take_their_audio_from_where_it_is(scripts, small_data, tmp_path):
    tier = scripts.tiers.TierData("T3", small_data, tmp_path)
    assert tier.unlabelled == [str(small_data / name) for name in ("pool", "prompts_en", "queen_en")]
    assert tier.labels("final", "all", 0).corpus == str(small_data / "queen_en")
    assert [file.name for file in (tmp_path / "T3").iterdir()] == ["made_of.json"]


def test_a_folder_made_of_other_data_is_refused(scripts, small_data, tmp_path):
    scripts.tiers.TierData("T2", small_data, tmp_path / "made")
    other = shutil.copytree(small_data, tmp_path / "other")
    (other / "unrelated").mkdir()
    shutil.copy(other / "prompts_en/train.parquet", other / "unrelated/train.parquet")
    scripts.tiers.TierData("T2", other, tmp_path / "made")
    changed = other / "prompts_en/train.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(changed)[:5], changed)
    with pytest.raises(FileExistsError, match="T2 was made of data with another prompts_en/train.parquet than .*other"):
        scripts.tiers.TierData("T2", other, tmp_path / "made")


def test_audio_like_that_of_the_labels(scripts, small_data, tmp_path):
    one_voice, prompts, characters = (scripts.tiers.TierData(name, small_data, tmp_path) for name in ("T1", "T2", "T3"))
    assert one_voice.near == one_voice.unlabelled
    assert characters.near == [str(small_data / "queen_en")]
    labelled, of_pool = prompts.near
    assert labelled == str(small_data / "prompts_en")
    pool = pyarrow.parquet.read_table(small_data / "pool/train-0.parquet").to_pylist()
    assert ids(of_pool) == [row["id"] for row in pool if row["source"] == "asterisk-core-sounds-fr"]


def test_a_pool_without_a_source_is_refused(scripts, small_data, tmp_path):
    table = pyarrow.parquet.read_table(small_data / "pool/train-0.parquet")
    shutil.copytree(small_data, tmp_path / "data")
    pyarrow.parquet.write_table(table.slice(0, 8), tmp_path / "data/pool/train-0.parquet")
    with pytest.raises(ValueError, match="pool has no audio whose source begins with asterisk"):
        scripts.tiers.TierData("T2", tmp_path / "data", tmp_path / "made")


def test_test_clips_in_the_pool_are_refused(scripts, small_data, tmp_path):
    table = pyarrow.parquet.read_table(small_data / "phones_ru/test.parquet")
    pool = pyarrow.parquet.read_table(small_data / "pool/train-0.parquet")
    name = pool["id"][0].as_py()
    mixed = tmp_path / "mixed"
    (mixed / "phones_ru").mkdir(parents=True)
    (mixed / "pool").symlink_to(small_data / "pool")
    (mixed / "queen_en").symlink_to(small_data / "queen_en")
    changed = table.set_column(table.column_names.index("id"), "id", pyarrow.array([name] * len(table)))
    pyarrow.parquet.write_table(changed, mixed / "phones_ru/test.parquet")
    (mixed / "phones_ru/train.parquet").symlink_to(small_data / "phones_ru/train.parquet")
    with pytest.raises(ValueError, match="1 test clips of phones_ru are in the pool"):
        scripts.tiers.TierData("T1", mixed, tmp_path / "out")
    assert not (tmp_path / "out/T1/sources").exists()


def test_data_that_another_process_made_first_is_taken(scripts, tmp_path):
    def make(folder):
        (folder / "file").write_text("mine")
        (tmp_path / "made").mkdir()
        (tmp_path / "made/file").write_text("of another")

    scripts.tiers.make_once(tmp_path / "made", make)
    assert (tmp_path / "made/file").read_text() == "of another"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


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
    config["arms"]["less"] = {
        "like": "mine",
        "finetuning": {"bf16": None},
        "finetuning_by_labels": {"all": {"head_learning_rate": None}},
    }
    less = scripts.recipes.build_recipe(config, "T1", "less", [MINUTES, "all"]).finetuning
    assert [("bf16" in less[size], "head_learning_rate" in less[size]) for size in less] == [
        (False, True),
        (False, False),
    ]
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
    with pytest.raises(ValueError, match=r"arms.y.self_training: missing last, student"):
        small_config(scripts, tmp_path, arms={"x": {}, "y": {"like": "x", "self_training": {"rounds": 1}}})
    with pytest.raises(ValueError, match=r"arms.x: it changes self_training, which it does not have"):
        small_config(scripts, tmp_path, arms={"x": {"tiers": {"T1": {"self_training_by_labels": {"all": {}}}}}})
    changes = {
        r"arms.y.tiers: there is no tier 'T9'": {"T9": {}},
        r"arms.y.tiers.T1: unknown self_training_by_label;": {"T1": {"self_training_by_label": {}}},
        r"by_labels: there is no label size '1O'; expected 0.1, all": {"T1": {"self_training_by_labels": {"1O": {}}}},
        r"T1.self_training_by_labels.all: unknown round;": {"T1": {"self_training_by_labels": {"all": {"round": 2}}}},
        r"expected one round of self-training at least, found rounds: 0": {"T1": {"self_training": {"rounds": 0}}},
        r"T2.finetuning_by_labels: there is no label size 3": {"T2": {"finetuning_by_labels": {3: {}}}},
    }
    for message, of_tiers in changes.items():
        arms = {"x": {}, "y": {"like": "x", "self_training": parts, "tiers": of_tiers}}
        with pytest.raises(ValueError, match=message):
            small_config(scripts, tmp_path, arms=arms, reference_arm="x")
    with pytest.raises(ValueError, match="reference_arm: there is no arm 'y'"):
        small_config(scripts, tmp_path, reference_arm="y")


def test_what_is_missing_or_goes_round_is_refused(scripts, tmp_path):
    config = yaml.safe_load(YAML.read_text())
    file = tmp_path / "wrong.yaml"

    def read(changed):
        file.write_text(yaml.safe_dump(changed))
        scripts.recipes.read_config(file)

    with pytest.raises(ValueError, match="wrong.yaml: expected KEY: VALUE lines, found str"):
        read("nothing")
    for name in ("tiers", "quick", "save_steps"):
        with pytest.raises(ValueError, match=f"wrong.yaml: missing {name}"):
            read({key: value for key, value in config.items() if key != name})
    tier = {key: value for key, value in config["tiers"]["T1"].items() if key != "scores"}
    with pytest.raises(ValueError, match="tiers.T1: missing scores"):
        read(config | {"tiers": {"T1": tier}})
    for change in ({"device": "cdua"}, {"scores": ["per"]}):
        with pytest.raises(ValueError, match="tiers.T1: expected device cpu or auto and scores of cer, wer, found"):
            read(config | {"tiers": {"T1": config["tiers"]["T1"] | change}})
    with pytest.raises(ValueError, match="quick: missing phase, seeds"):
        read(config | {"quick": {"tier": "T1", "labels": [10], "arms": []}})
    with pytest.raises(ValueError, match="arms.x.like: it goes round in a circle, x, y, x"):
        read(config | {"arms": {"x": {"like": "y"}, "y": {"like": "x"}}})
    for budget in ("z", "transformers_wav2vec2", "scratch_whole"):
        with pytest.raises(ValueError, match=f"arms.x.whole_budget: expected an arm with .*, found '{budget}'"):
            read(config | {"arms": {**config["arms"], "x": {"whole_budget": budget}}})
    with pytest.raises(ValueError, match="arms.x: expected KEY: VALUE lines, found None"):
        read(config | {"arms": {"x": None}})
    read(config | {"arms": {**config["arms"], "x": {"like": "hubert_2", "stages": None, "tiers": None}}})
    with pytest.raises(ValueError, match="few_shot: unknown n_wya; expected"):
        read(config | {"few_shot": {"n_wya": 5}})
    for name in ("scratch", "transformers_wav2vec2", "scratch_self_trained"):
        with pytest.raises(ValueError, match=f"reference_arm: expected a pre-training of this package, found {name}"):
            read(config | {"reference_arm": name})
    for found in (50, [50], [50, 50], [0, 50], [50, 1.5]):
        with pytest.raises(ValueError, match="timed_updates: expected two numbers of updates"):
            read(config | {"timed_updates": found})
    with pytest.raises(ValueError, match="arms.y.like: there is no arm 'z'"):
        read(config | {"arms": {"x": {"like": "y"}, "y": {"like": "z"}}})


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"pretraining": {"learnin_rate": 1}}, "x in T1: pretraining has no option learnin_rate"),
        ({"finetuning": {"learnin_rate": 1}}, "x in T1: finetuning has no option learnin_rate"),
        ({"finetuning": {"seed": 1}}, "x in T1: finetuning may not say seed, which the comparison sets"),
        ({"pretraining": {"units": "mine"}}, "x in T1: pretraining may not say units"),
        ({"pretraining": {"logging_steps": 7}}, "x in T1: pretraining may not say logging_steps"),
        ({"stages": [{"units": {"num_unit": 3}}]}, "x in T1: units has no option num_unit"),
        ({"peer": True, "pretraining": {"mask_prob": 0.5}}, "x in T1: pretraining has no option mask_prob"),
        (
            {"like": "best_rq", "self_training": {"rounds": 1, "student": {"max_step": 1}, "last": {}}},
            "x in T1, self_training.student: finetuning has no option max_step",
        ),
    ],
)
def test_options_that_no_script_has_are_refused_before_anything_is_trained(scripts, tmp_path, arm, message):
    config = yaml.safe_load(YAML.read_text())
    config["arms"]["x"] = arm
    with pytest.raises(ValueError, match=message):
        scripts.recipes.build_recipe(config, "T1", "x", ["3"])


def test_a_budget_is_that_of_the_recipe_and_of_the_size(scripts, tmp_path):
    config = scripts.recipes.read_config(YAML)

    def names():
        (chain,) = plan(scripts, config, tmp_path, arms=["scratch_whole_self_trained"])
        return [chain.run_name(size) for size in ("3", "10")]

    before = names()
    by_labels = config["arms"]["hubert+best_rq_self_trained"]["tiers"]["T1"]["self_training_by_labels"]
    by_labels["10"] = by_labels.pop(10) | {"rounds": 9}
    after = names()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_kept_rows_are_of_the_recipes_of_the_yaml(scripts, tmp_path):
    rows = scripts.processes.Results(YAML.parent / "comparison/results.parquet").rows()
    arms = ["scratch", "hubert+best_rq", "hubert+best_rq_self_trained"]
    config = scripts.recipes.read_config(YAML)
    chains = plan(scripts, config, tmp_path, rows, arms=arms, seeds=[0, 1, 2])
    assert [chain.sizes for chain in chains] == 9 * [[]]


def test_kept_rows_with_tuned_fine_tuning_are_of_the_recipes_of_their_yaml(scripts, tmp_path):
    rows = scripts.processes.Results(YAML.parent / "comparison_tuned/results.parquet").rows()
    config = scripts.recipes.read_config(TUNED)
    chains = plan(scripts, config, tmp_path, rows, arms=["scratch", "hubert+best_rq"], seeds=[0, 1, 2], labels=["3"])
    assert [chain.sizes for chain in chains] == 6 * [[]]


def test_tuned_fine_tuning_begins_with_the_encoders_of_the_comparison(scripts):
    tuned, config = (scripts.recipes.read_config(file) for file in (TUNED, YAML))
    for arm in tuned["arms"]:
        hashes = {scripts.recipes.build_recipe(one, "T1", arm, ["3"]).pretraining_hash() for one in (tuned, config)}
        assert len(hashes) == 1


def test_each_arm_is_held_against_scratch_with_its_own_budget(scripts):
    config = scripts.recipes.read_config(YAML)
    config["arms"]["longer"] = {"like": "scratch_whole"}
    config["arms"]["other"] = {"like": "scratch", "whole_budget": "denoising"}
    found = scripts.recipes.whole_budgets(config)
    assert found["hubert"] == found["hubert+best_rq"] == found["transformers_wav2vec2"] == "scratch_whole"
    assert found["hubert+best_rq_self_trained"] == "scratch_whole_self_trained"
    assert found["hubert+best_rq_near"] == "scratch_whole_near"
    assert found["denoising"] == "other"
    assert not {"scratch", "frozen_random", "hubert+best_rq_fourfold"} & set(found)
    held_against = {"scratch", "scratch_whole", "scratch_whole_self_trained", "scratch_whole_near", "longer", "other"}
    assert scripts.recipes.baselines(config) == held_against


def test_quick_run_is_as_its_section_says_but_for_what_is_given(scripts, tmp_path):
    config = scripts.recipes.read_config(YAML)
    quick = config["quick"]
    chains = plan(scripts, config, tmp_path, quick=True)
    assert {(chain.recipe.tier, chain.seed, chain.phase) for chain in chains} == {("T1", 0, "dev")}
    assert [chain.recipe.arm for chain in chains] == quick["arms"]
    assert {size for chain in chains for size in chain.sizes} == {"10"}
    given = plan(scripts, config, tmp_path, quick=True, seeds=[1, 2], labels=["3"], arms=["best_rq"], phase="final")
    assert [(chain.seed, chain.sizes, chain.phase) for chain in given] == [(1, ["3"], "final"), (2, ["3"], "final")]
    assert given[0].recipe.updates == quick["pretraining"]["max_steps"]


def plan(scripts, config, tmp_path, rows=(), **options):
    args = scripts.objectives.complete(scripts.objectives.ComparisonArguments(**options), config)
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
    without_pretraining = {"scratch", "scratch_whole", "scratch_whole_self_trained", "scratch_whole_near"}
    without_pretraining |= {"frozen_random", "log_mel"}
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
