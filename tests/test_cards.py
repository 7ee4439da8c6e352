"""Model cards: complete, true to the run, accepted by the Hub, and their code runs."""

import re
import runpy
import shlex
from pathlib import Path

import imageio_ffmpeg
import pytest
import soundfile
import yaml
from huggingface_hub import DatasetCard, EvalResult, HfApi, ModelCard, ModelCardData
from transformers import Wav2Vec2FeatureExtractor

from hf_speechcl import OBJECTIVES, SpeechCLConfig, SpeechCLForSequenceClassification
from hf_speechcl.cards import (
    DEMO_LICENSE,
    NOT_STATED,
    USE_CLASSIFIER,
    describe_licenses,
    describe_objectives,
    error_rate_results,
    hub_name,
    rename_model,
    write_card,
)
from hf_speechcl.citations import REFERENCES, bibtex, methods_of
from hf_speechcl.hub import add_results
from hf_speechcl.training.arguments import SpeechTrainingArguments
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import FAST_RUN, ROOT, TINY
from tests.local_hub import card_problems

SCRIPTS = {"scripts/pretrain.py": pretrain, "scripts/finetune_ctc.py": finetune_ctc}
SCORES = {
    "corpus": ["demo"], "split": "test", "clips": 83, "hours": 0.05, "text_normalization": "basic",
    "decoding": "greedy", "wer": 0.5, "wer_low": 0.4, "wer_high": 0.6, "cer": 0.2, "cer_low": 0.1, "cer_high": 0.3,
}  # fmt: skip


def write_classifier(folder, **options):
    """A card as a script that fine-tunes a classifier would write it."""
    config = SpeechCLConfig(**TINY, id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    SpeechCLForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(folder)
    args = SpeechTrainingArguments(output_dir=str(folder), use_cpu=True, **options)
    write_card(
        folder, config=config, title="Yes or no", summary="It tells yes from no.", usage=USE_CLASSIFIER, tags=[],
        pipeline_tag="audio-classification", sources=["demo"], methods=[], args=args, data=[], model="Small.",
        training="Little.", results="Few.", limits="All.",
        eval_results=[
            EvalResult(
                task_type="audio-classification", dataset_type="demo", dataset_name="demo", dataset_split="test",
                metric_type="accuracy", metric_value=50.0, metric_args={"interval_95": [40.0, 60.0]},
            )
        ],
    )  # fmt: skip
    return folder


@pytest.fixture
def cards(trained, tmp_path, monkeypatch, clips, audio_folder):
    """A folder to work in as a reader of the cards would: models, recordings, scripts."""
    for name in ("encoder", "ctc"):
        (tmp_path / name).symlink_to(trained / name)
    write_classifier(tmp_path / "classifier")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    soundfile.write(tmp_path / "speech.wav", clips[1], 16000, subtype="FLOAT")
    lines = ["file_name,text", *(f"clip{number}.wav,ab" for number in range(4))]
    (audio_folder / "metadata.csv").write_text("\n".join(lines))
    for name in ("my_audio", "my_labelled_audio"):
        (tmp_path / name).symlink_to(audio_folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.chdir(tmp_path)
    return {name: (tmp_path / name / "README.md").read_text() for name in ("encoder", "ctc", "classifier")}


@pytest.mark.parametrize("model", ["encoder", "ctc", "classifier"])
def test_every_block_of_code_runs_as_it_stands(model, cards, capsys):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", cards[model], re.DOTALL | re.MULTILINE)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, f"{model}/README.md", "exec"), {})
        elif language == "bash":
            python, script, *options = shlex.split(code.replace("\\\n", " "))
            assert python == "python"
            assert Path(script).is_file()
            SCRIPTS[script]([*options, *FAST_RUN, "--max_steps", "1", "--validation_fraction", "0.3"])
    expected = {"encoder": "python python bash bash bibtex", "ctc": "python python bash bibtex"}
    assert " ".join(language for language, _ in blocks) == expected.get(model, "python bibtex")


@pytest.mark.parametrize("model", ["encoder", "ctc", "classifier"])
def test_cards_are_whole_and_the_hub_accepts_them(model, cards, hub):
    card = ModelCard(cards[model])
    card.validate()
    assert ("POST", "/api/validate-yaml") in hub.requests
    prose = card.text.split("```bibtex")[0]
    assert not re.search(r"\{\{|\}\}|\{\w+\}|\[More Information|\bTODO\b|\bNone\b(?!\])|\bnan\b", prose)
    assert not re.search(r"/tmp|/work|/home", card.content)
    headings = re.findall(r"^## (.*)", card.text, re.MULTILINE)
    assert headings == ["How to use", "Data", "Model", "Training", "Results", "Limits", "Citation"]
    assert not re.search(r"^## .*\n\n## ", card.text, re.MULTILINE)
    assert DEMO_LICENSE in card.text
    if model != "classifier":
        assert re.search(r"\| demo \| train \| \d+ \| 0\.\d\d \| 16000 Hz \|", card.text)
        assert "3 updates of up to 12 s of audio" in card.text
        assert "![Curves of the losses and metrics against updates](curves.png)" in card.text
        assert "masked_prob" not in card.text
        assert re.search(r"\| `best_rq` \| 1 \| num_codebooks 4, .*seed 0 \|", card.text) or model == "ctc"
    for name in {"encoder": ["best_rq", "prototypical"], "ctc": ["best_rq", "ctc"], "classifier": []}[model]:
        assert REFERENCES[name]["title"] in card.text


def test_options_of_the_card_stand_in_it(tmp_path):
    card = ModelCard.load(write_classifier(tmp_path / "a", license="cc-by-sa-4.0", language=["de", "en"]) / "README.md")
    assert (card.data.license, card.data.language) == ("cc-by-sa-4.0", ["de", "en"])
    assert "Licence of the model: cc-by-sa-4.0." in card.text
    card = ModelCard.load(write_classifier(tmp_path / "b") / "README.md")
    assert card.data.license is None
    assert f"Licence of the model: {NOT_STATED}." in card.text
    with pytest.raises(ValueError, match="license 'apache' is unknown to the Hub: expected afl-3.0, "):
        SpeechTrainingArguments(license="apache")
    with pytest.raises(ValueError, match="language: expected ISO 639 codes such as en, found English"):
        SpeechTrainingArguments(language=["English"])


def test_licence_of_a_corpus_is_what_it_says_itself_or_what_the_option_says(hub, tmp_path, caplog):
    for name, file, text in [("stated", "LICENSE.txt", "\n# Some Licence 1.0\nmore"), ("silent", "clip.wav", "")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    (tmp_path / "silent/LICENSES").mkdir()
    HfApi().create_repo("tester/data", repo_type="dataset")
    card = DatasetCard("---\nlicense: cc-by-4.0\n---\n")
    HfApi().upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="tester/data", repo_type="dataset"
    )
    sources = ["demo", str(tmp_path / "stated"), str(tmp_path / "silent"), "tester/data:clean", "tester/absent"]
    stated = [
        f"`demo`: {DEMO_LICENSE}.",
        "`stated`: Some Licence 1.0 (first line of its LICENSE.txt).",
        f"`silent`: {NOT_STATED}.",
        "`tester/data:clean`: cc-by-4.0.",
        f"`tester/absent`: {NOT_STATED}.",
    ]
    assert describe_licenses(sources, None) == stated
    assert describe_licenses(sources, "CC0") == [line.replace(NOT_STATED, "CC0") for line in stated]


def test_results_are_added_once_and_replaced_by_those_of_the_same_kind(trained, tmp_path):
    file = tmp_path / "README.md"
    file.write_text((trained / "ctc" / "README.md").read_text())
    before = ModelCard.load(file)
    add_results(tmp_path, SCORES)
    once = file.read_text()
    add_results(tmp_path, SCORES)
    assert file.read_text() == once
    add_results(tmp_path, SCORES | {"wer": 0.25})
    add_results(tmp_path, SCORES | {"decoding": "beam 100, 3-gram", "wer": 0.125})
    add_results(tmp_path, SCORES | {"text_normalization": "none", "corpus": ["user/name:clean"]})
    card = ModelCard.load(file)
    assert not card_problems(file.read_text())
    found = {
        (result.dataset_name, result.dataset_config, result.dataset_split, result.metric_args["decoding"]): result
        for result in card.data.eval_results
        if result.metric_type == "wer"
    }
    assert len(card.data.eval_results) == 2 * len(found) == len(before.data.eval_results) + 6
    assert found["demo", None, "test", "greedy"].metric_value == 25
    assert found["demo", None, "test", "greedy"].metric_args["interval_95"] == [40, 60]
    assert found["demo", None, "test", "beam 100, 3-gram"].metric_value == 12.5
    assert "user/name" in [result.dataset_type for result in card.data.eval_results]
    assert "| demo | test | 83 | 0.05 | basic | greedy | 25.0% [40.0, 60.0] | 20.0% [10.0, 30.0] |" in card.text
    assert "| user/name:clean | test | 83 | 0.05 | none | greedy | 50.0% [40.0, 60.0] |" in card.text
    outside = re.sub(r"<!-- results.*end of results -->", "", card.text, flags=re.DOTALL)
    assert outside == re.sub(r"<!-- results.*end of results -->", "", before.text, flags=re.DOTALL)


def test_a_result_names_one_data_set_of_the_hub_or_several_sources_as_they_are():
    results = {"split": "test", "text_normalization": "basic", "decoding": "greedy", "clips": 1, "hours": 0.1}
    results |= {f"{name}{end}": 0.5 for name in ("wer", "cer") for end in ("", "_low", "_high")}
    named = {}
    for corpus in (["user/data:x"], ["a/b:x", "c/d"], ["my: audio"]):
        result = error_rate_results({**results, "corpus": corpus})[0]
        named[tuple(corpus)] = result.dataset_type, result.dataset_config
    assert list(named.values()) == [("user/data", "x"), ("a/b:x, c/d", None), ("my: audio", None)]


def test_results_are_added_to_a_card_written_by_hand(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no README.md to add results to"):
        add_results(tmp_path, SCORES)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nWords.\n")
    add_results(tmp_path, SCORES)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.startswith("# Mine\n\nWords.")
    assert "50.0% [40.0, 60.0]" in card.text
    assert not card_problems((tmp_path / "README.md").read_text())


def test_renamed_card_says_its_new_name_in_code_alone():
    data = ModelCardData(model_name="encoder", tags=["a"])
    text = 'an "encoder"\n\n```python\nencoder = load("encoder")\n```\n```bash\nrun --model "encoder"\n```\n'
    renamed = ModelCard(rename_model(f"---\n{data}\n---\n{text}", "user/name"))
    assert renamed.data.model_name == "user/name"
    expected = text.replace('load("encoder")', 'load("user/name")')
    assert renamed.text == expected.replace('--model "encoder"', '--model "user/name"')
    assert rename_model("no metadata", "user/name") == "no metadata"


def test_base_model_is_named_if_it_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    names = ["user/name", "user/name@v1", "runs/mine", "/somewhere/name", "tiny", None]
    assert [hub_name(name) for name in names] == ["user/name", "user/name", None, None, None, None]


def test_every_objective_is_cited_and_described():
    objectives = {name: {} for name in OBJECTIVES}
    entries = bibtex(methods_of(objectives))
    assert len(re.findall(r"^@(?:article|inproceedings|misc)\{\w+,$", entries, re.MULTILINE)) == len(OBJECTIVES) + 1
    assert entries.count("{") == entries.count("}")
    assert methods_of({"siamese": {"form": "simsiam"}, "cpc": {}}) == ["simsiam", "cpc"]
    table = describe_objectives({"wav2vec2": {"weight": 0.5, "temperature": 0.2}})
    assert "| `wav2vec2` | 0.5 | num_negatives 100, temperature 0.2, num_codebooks 2," in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": "apache"}, '"license" must be one of the licences'),
        ({"language": "English"}, '"language" must be'),
        ({"tags": [1]}, '"tags" must be'),
        ({"datasets": ["/my/folder"]}, '"datasets" must be'),
        ({"base_model": "runs/mine/checkpoint"}, '"base_model" must be'),
        ({"pipeline_tag": "speech"}, '"pipeline_tag" must be a task'),
        ({"library_name": None}, '"library_name" must be not empty'),
        (
            {"model-index": [{"name": "a", "results": [{"dataset": {"name": "b", "type": "b"}}]}]},
            "results[0].task.type",
        ),
        ({"model-index": [{"results": []}]}, '"model-index[0].name" must be a text'),
        ({"model-index": {}}, '"model-index" must be an array'),
    ],
)
def test_local_hub_refuses_metadata_that_the_hub_refuses(change, message):
    good = {"license": "mit", "language": "en", "tags": ["a"], "library_name": "transformers"}
    assert card_problems(f"---\n{yaml.safe_dump(good)}---\ntext") == []
    assert message in "\n".join(card_problems(f"---\n{yaml.safe_dump(good | change)}---\ntext"))


def test_model_cards_of_folders_are_collected_by_one_command(trained, tmp_path, capsys, monkeypatch):
    collect = runpy.run_path(str(ROOT / "scripts" / "model_cards.py"))["main"]
    monkeypatch.chdir(tmp_path)
    collect([f"speech={trained / 'ctc'}", str(trained / "encoder")])
    assert capsys.readouterr().out == "model_cards/speech/README.md\nmodel_cards/encoder/README.md\n"
    for name, folder in [("speech", "ctc"), ("encoder", "encoder")]:
        assert sorted(path.name for path in (tmp_path / "model_cards" / name).iterdir()) == ["README.md", "curves.png"]
        copied = (tmp_path / "model_cards" / name / "README.md").read_text()
        assert copied == (trained / folder / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="no model in"):
        collect([str(tmp_path)])
