"""The real Hub client against a server on this machine: publishing, loading by name, and what may not get out."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import httpx2
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCTC, AutoModelForPreTraining, pipeline

import hf_speechcl.hub
from hf_speechcl import SpeechCLConfig, SpeechCLForCTC, SpeechCLForPreTraining
from hf_speechcl.data.corpora import corpus_splits, load_corpus, load_train_and_validation
from hf_speechcl.data.demo import load_demo
from hf_speechcl.evaluation.evaluate import main as evaluate
from hf_speechcl.evaluation.few_shot import PrototypicalClassifier
from hf_speechcl.hub import PUBLISHED, find_model, publish, published_files
from hf_speechcl.publish import main as publish_main
from hf_speechcl.training.finetune_classifier import main as finetune_classifier
from hf_speechcl.training.finetune_ctc import main as finetune_ctc
from hf_speechcl.training.make_units import UnitArguments, build_features
from hf_speechcl.training.make_units import main as make_units
from hf_speechcl.training.pretrain import main as pretrain
from tests.conftest import FAST_RUN, ROOT, TINY_OPTIONS, TOKEN, run_script


def files_of(name, **revision):
    return set(HfApi().list_repo_files(name, **revision))


CLEAN_PROCESS = """
import json, sys
import numpy as np
from transformers import AutoModel, pipeline

try:
    import hf_speechcl
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the package is here")
recognizer = pipeline("automatic-speech-recognition", model="tester/voice", trust_remote_code=True)
assert type(recognizer.model).__module__.startswith("transformers_modules")
clips = np.load(sys.argv[1])
print(json.dumps([recognizer(clips[name])["text"] for name in clips]))
try:
    AutoModel.from_pretrained("tester/voice", trust_remote_code=False)
except (ValueError, KeyError) as error:
    print("refused")
"""
# As site-packages may hold an editable install, whose finder would find the package.
WITHOUT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"


def test_published_recognizer_gives_its_text_in_a_process_without_the_package(hub, trained, clips, tmp_path):
    with torch.no_grad():
        model = AutoModelForCTC.from_pretrained(trained / "ctc")
        model.lm_head.bias[0] -= 5  # or after three updates all would be blank
    folder = tmp_path / "voice"
    model.save_pretrained(folder)
    for file in published_files(trained / "ctc"):
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    recognizer = pipeline("automatic-speech-recognition", model=str(folder))
    texts = [recognizer(clip)["text"] for clip in clips]
    assert len(set(texts)) > 1

    publish(folder, "tester/voice")
    assert [pipeline("automatic-speech-recognition", model="tester/voice")(clip)["text"] for clip in clips] == texts
    np.savez(tmp_path / "clips.npz", *clips)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_EDITABLE + CLEAN_PROCESS, str(tmp_path / "clips.npz")],
        capture_output=True, text=True, cwd="/", env=env | {"HF_HOME": str(tmp_path / "empty")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[0]) == texts
    assert "refused" in result.stdout


def test_pretrained_folder_loads_by_name_and_trains_on(hub, trained, tmp_path):
    publish(trained / "encoder", "tester/encoder")
    weights = load_file(trained / "encoder" / "model.safetensors")
    whole = AutoModelForPreTraining.from_pretrained("tester/encoder").state_dict()
    assert all(torch.equal(whole[name], weights[name]) for name in weights)
    body = AutoModel.from_pretrained("tester/encoder").state_dict()
    assert all(torch.equal(weight, weights[f"speechcl.{name}"]) for name, weight in body.items())
    pretrain(
        ["--encoder", "tester/encoder", "--output_dir", str(tmp_path / "more"), "--max_steps", "1", "--learning_rate",
         "0", *FAST_RUN]
    )  # fmt: skip
    assert ModelCard.load(tmp_path / "more" / "README.md").data.base_model == "tester/encoder"
    more = load_file(tmp_path / "more" / "model.safetensors")
    assert all(torch.equal(more[name], weights[name]) for name in weights if name.startswith("speechcl."))
    finetune_ctc(
        ["--model", "tester/encoder", "--output_dir", str(tmp_path / "tuned"), "--max_steps", "1", "--learning_rate",
         "0", *FAST_RUN]
    )  # fmt: skip
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all(torch.equal(tuned[name], weights[name]) for name in tuned if name.startswith("speechcl."))
    publish(tmp_path / "tuned", "tester/tuned")  # its code is its own, not that of tester/encoder
    assert ModelCard.load(tmp_path / "tuned" / "README.md").data.base_model == "tester/encoder"


def test_saving_and_pushing_at_once_sends_the_code_too(hub, config, tmp_path, clips):
    SpeechCLForCTC(config).save_pretrained(tmp_path / "my-model", push_to_hub=True, private=True, token=TOKEN)
    assert HfApi().model_info("tester/my-model", token=TOKEN).private
    sent = set(HfApi().list_repo_files("tester/my-model", token=TOKEN))
    assert sent >= {"config.json", "model.safetensors", "configuration_speechcl.py", "modeling_speechcl.py"}
    assert (tmp_path / "my-model/model.safetensors").exists()


def test_revisions_and_snapshots_load_what_was_published_as_them(hub, trained, tmp_path, clips):
    config = SpeechCLConfig.from_pretrained(trained / "encoder")
    folder = tmp_path / "model"
    commits = {}
    for name in ("first", "second"):
        SpeechCLForPreTraining(config).save_pretrained(folder)
        (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
        url = publish(folder, "tester/two", tag=name, revision=None if name == "first" else "next")
        commits[name] = (url.rsplit("/", 1)[1], load_file(folder / "model.safetensors"))

    def loads(name, expected):
        found = load_file(os.path.join(find_model(name), "model.safetensors"))
        return all(torch.equal(found[key], expected[key]) for key in expected)

    (first, first_weights), (second, second_weights) = commits.values()
    assert not loads("tester/two@first", second_weights)
    for name in ("tester/two", "tester/two@main", "tester/two@first", f"tester/two@{first}"):
        assert loads(name, first_weights)
    for name in (
        "tester/two@next",
        "tester/two@second",
        f"tester/two@{second}",
        snapshot_download("tester/two", revision="next"),
    ):
        assert loads(name, second_weights)
    classifier = PrototypicalClassifier("tester/two@second")
    assert torch.equal(
        classifier.encoder.feature_projection.weight, second_weights["speechcl.feature_projection.weight"]
    )
    features = build_features(UnitArguments(features="tester/two@next", layer=1, device="cpu"))
    assert features.source["features"] == "tester/two@next"
    with pytest.raises(FileNotFoundError, match="tester/two has no branch, tag or commit 'third'"):
        find_model("tester/two@third")
    with pytest.raises(FileNotFoundError, match="no folder tester/none here, and no such model on the Hub"):
        find_model("tester/none")


def test_training_publishes_what_it_has_trained(hub, trained, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pretrain(
        ["--output_dir", str(tmp_path / "pushed"), "--max_steps", "2", "--encoder_options", *TINY_OPTIONS, *FAST_RUN,
         "--save_strategy", "steps", "--save_steps", "1", "--push_to_hub", "True", "--hub_private_repo", "True"]
    )  # fmt: skip
    assert HfApi().model_info("tester/pushed").private
    finetune_ctc(
        ["--model", str(trained / "encoder"), "--output_dir", str(tmp_path / "ctc"), "--max_steps", "2", *FAST_RUN,
         "--push_to_hub", "True", "--hub_model_id", "tester/my-ctc", "--hub_token", TOKEN, "--hub_revision", "trial"]
    )  # fmt: skip
    assert files_of("tester/my-ctc") == {".gitattributes"}
    for name, folder, revision in [("tester/pushed", "pushed", None), ("tester/my-ctc", "ctc", "trial")]:
        there = files_of(name, revision=revision)
        assert there == {file.name for file in published_files(tmp_path / folder)} | {".gitattributes"}
        assert there >= {"model.safetensors", "curves.png", "results.json", "modeling_speechcl.py"}
        card = ModelCard.load(
            HfApi().hf_hub_download(name, "README.md", revision=revision), ignore_metadata_errors=False
        )
        assert (
            f'from_pretrained("{name}", trust_remote_code=True)' in card.text
        )  # our card, not Trainer's, by its new name
        assert "generated automatically" not in card.text
        card.validate()
        assert not list((tmp_path / folder).rglob("training_args.bin"))
        assert len(HfApi().list_repo_commits(name, revision=revision)) == 2
    assert "published: " in caplog.text
    assert TOKEN not in caplog.text


def test_classifier_is_published_by_its_training_and_loads_by_name(hub, trained, tmp_path, audio_folder, clips):
    lines = ["file_name,keyword", *(f"clip{number}.wav,{'yes' if number % 2 else 'no'}" for number in range(4))]
    (audio_folder / "metadata.csv").write_text("\n".join(lines))
    finetune_classifier(
        ["--model", str(trained / "encoder"), "--corpus", str(audio_folder), "--label_column", "keyword",
         "--validation_fraction", "0.3", "--output_dir", str(tmp_path / "yes-no"), "--max_steps", "2", *FAST_RUN,
         "--push_to_hub", "True", "--license", "mit", "--corpus_license", "CC0"]
    )  # fmt: skip
    classifier = pipeline("audio-classification", model="tester/yes-no")
    assert {answer["label"] for answer in classifier(clips[0])} == {"yes", "no"}
    card = ModelCard.load(HfApi().hf_hub_download("tester/yes-no", "README.md"))
    card.validate()
    assert 'model="tester/yes-no", trust_remote_code=True' in card.text
    assert "- `audio`: CC0." in card.text
    assert card.data.license == "mit"
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy", "f1"]
    assert re.search(r"\| audio \| validation \| \d+ \| [\d.]+ \| [\d.]+% \[[\d., ]+\] \| [\d.]+% \[", card.text)


def test_publishing_again_sends_only_what_changed_and_clears_what_is_gone(hub, trained, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in published_files(trained / "ctc"):
        (folder / file.name).write_bytes(file.read_bytes())
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "options.json",
        "preflight_train.json",
        "scheduler.pt",
        "notes.txt",
    ):
        (folder / name).write_text("mine")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("mine")
    publish(folder, "tester/again")
    HfApi().upload_file(path_or_fileobj=b"kept", path_in_repo="extra.txt", repo_id="tester/again")
    (folder / "vocab.json").unlink()
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\nanother card")
    hub.requests.clear()
    publish(folder, "tester/again")
    assert not [path for method, path in hub.requests if method == "PUT"]
    expected = {file.name for file in published_files(folder)} | {".gitattributes", "extra.txt"}
    assert files_of("tester/again") == expected
    assert "results.json" in expected
    assert not expected & {"optimizer.pt", "vocab.json", "options.json", "checkpoint-3/model.safetensors"}


def test_results_that_name_clips_are_not_published(trained, tmp_path, caplog):
    folder = shutil.copytree(trained / "ctc", tmp_path / "model")
    for content in ('{"wer": 0.5, "transcripts": [{"id": "mine.wav", "reference": "words"}]}', "[]", "3", ""):
        (folder / "results.json").write_text(content)
        assert "results.json" not in {file.name for file in published_files(folder)}
    assert caplog.text.count("results.json is not published") == 4


def test_weights_in_shards_go_whole_or_not_at_all(hub, config, tmp_path):
    folder = tmp_path / "model"
    SpeechCLForCTC(config).save_pretrained(folder, max_shard_size="20KB")
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    publish(folder, "tester/shards")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    AutoModelForCTC.from_pretrained("tester/shards")
    SpeechCLForCTC(config).save_pretrained(folder)
    publish(folder, "tester/shards")
    assert [name for name in files_of("tester/shards") if "safetensors" in name] == ["model.safetensors"]
    SpeechCLForCTC(config).save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(ValueError, match="holds model.safetensors and model.safetensors.index.json with its parts"):
        publish(folder, "tester/shards")
    (folder / "model.safetensors").unlink()
    publish(folder, "tester/shards")
    assert {path.name for path in shards} <= files_of("tester/shards")
    shards[-1].unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {shards[-1].name}"):
        publish(folder, "tester/shards")


@pytest.mark.parametrize(
    ("method", "pattern", "status", "times"),
    [
        ("PUT", "/lfs/", 503, 1),
        ("POST", "/commit/", 503, 2),
        ("POST", "/commit/", 0, 1),
        ("POST", "/repos/create", 500, 1),
    ],
)
def test_trouble_of_the_server_is_waited_out(method, pattern, status, times, hub, trained, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail(method, pattern, times, status)
    publish(trained / "ctc", "tester/shaky", tag="v1")
    assert {file.name for file in published_files(trained / "ctc")} <= files_of("tester/shaky", revision="v1")
    assert hub.failures[0][2] == 0


def test_interrupted_upload_goes_on_without_sending_the_weights_again(hub, trained):
    hub.fail("POST", "/commit/", 100)
    with pytest.raises(ConnectionError, match=r"the Hub is in trouble \(503\): try again later"):
        publish(trained / "ctc", "tester/later")
    hub.failures.clear()
    hub.requests.clear()
    publish(trained / "ctc", "tester/later")
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert "model.safetensors" in files_of("tester/later")


@pytest.mark.parametrize(("status", "error"), [(503, ConnectionError), (0, ConnectionError), (403, PermissionError)])
def test_weights_that_do_not_arrive_are_explained(status, error, hub, trained, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.fail("PUT", "/lfs/", 1000, status)
    with pytest.raises(error, match=r"in trouble|cannot be reached|may not write"):
        publish(trained / "ctc", "tester/heavy")


def wrong_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")


def no_token(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")


def reading_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def narrow_token(hub, monkeypatch):
    HfApi().create_repo("tester/voice")
    monkeypatch.setenv("HF_TOKEN", "hf_fine")


def offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def gone(hub, monkeypatch):
    hub.stop()
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def another_model(hub, monkeypatch):
    HfApi().create_repo("tester/voice", private=True)
    HfApi().upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id="tester/voice")


def public(hub, monkeypatch):
    HfApi().create_repo("tester/voice", private=False)


def nothing(hub, monkeypatch):
    pass


@pytest.mark.parametrize(
    ("situation", "name", "error", "message"),
    [
        (no_token, "tester/voice", PermissionError, "no token of the Hub: make one that can write"),
        (wrong_token, "tester/voice", PermissionError, "the Hub does not know this token"),
        (reading_token, "tester/voice", PermissionError, "this token of the Hub can only read"),
        (narrow_token, "tester/voice", PermissionError, "this token may not write to tester/voice"),
        (nothing, "another/voice", PermissionError, "would belong to another, and this token to tester: publish as"),
        (nothing, "a/b/c", ValueError, "'a/b/c' is no name for a repository, which is user/name"),
        (offline, "tester/voice", ConnectionError, "HF_HUB_OFFLINE is set"),
        (gone, "tester/voice", ConnectionError, "the Hub at http://127.0.0.1:[0-9]+ cannot be reached"),
        (another_model, "tester/voice", FileExistsError, "holds no model of hf_speechcl, but config.json: publish"),
        (public, "tester/voice", FileExistsError, "is there already and is public: change that in its settings"),
    ],
)
def test_what_is_in_the_way_is_said_before_anything_is_done(
    situation, name, error, message, hub, trained, monkeypatch, tmp_path
):
    situation(hub, monkeypatch)
    with pytest.raises(error, match=message):
        publish(trained / "ctc", name, private=True)
    arguments = ["--push_to_hub", "True", "--hub_model_id", name, "--hub_private_repo", "True"]
    with pytest.raises(error, match=message):
        finetune_ctc(["--output_dir", str(tmp_path / "run"), *FAST_RUN, *arguments])
    assert not (tmp_path / "run").exists()


def test_tag_that_is_taken_is_refused(hub, trained):
    publish(trained / "ctc", "voice", tag="v1")
    with pytest.raises(FileExistsError, match="tester/voice has a tag v1 already"):
        publish(trained / "ctc", "voice", tag="v1")


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_pushing_of_checkpoints_is_refused_at_once(strategy, tmp_path, capsys):
    options = ["--push_to_hub", "True", "--hub_strategy", strategy]
    with pytest.raises(SystemExit):
        pretrain(["--use_cpu", "--output_dir", str(tmp_path / "run"), *options])
    assert f"hub_strategy must be end, found '{strategy}'" in capsys.readouterr().err


def test_private_model_is_seen_with_a_token_only(hub, trained, monkeypatch):
    publish(trained / "ctc", "tester/secret", private=True)
    assert os.path.isfile(os.path.join(find_model("tester/secret"), "config.json"))
    no_token(hub, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    with pytest.raises(FileNotFoundError, match="if it is private, log in"):
        find_model("tester/secret")


def test_a_gated_model_and_an_expired_token_are_told_apart(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(FileNotFoundError, match="does not know your token: log in"):
        find_model("tester/absent")

    def gated(*args, **kwargs):
        raise GatedRepoError("gated", response=httpx2.Response(403, request=httpx2.Request("GET", "http://hub")))

    monkeypatch.setattr("hf_speechcl.hub.snapshot_download", gated)
    with pytest.raises(FileNotFoundError, match="tester/voice is gated: accept its terms at"):
        find_model("tester/voice")


def test_dry_run_shows_what_would_go_and_asks_nobody(hub, trained, capsys):
    publish_main([str(trained / "ctc"), "tester/dry", "--private", "True", "--dry_run", "True"])
    shown = capsys.readouterr().out
    for file in published_files(trained / "ctc"):
        assert f"{file.stat().st_size:,} bytes  {file.name}\n" in shown
    assert "tester/dry" in shown
    assert "options.json" not in shown
    assert not hub.requests
    publish_main([str(trained / "ctc"), "tester/dry", "--revision", "b"])
    assert "/tester/dry/commit/" in capsys.readouterr().out
    assert "model.safetensors" in files_of("tester/dry", revision="b")


def test_incomplete_folders_are_not_published(trained, config, tmp_path):
    for name, message in [("absent", "found no folder"), ("hub", "no model in")]:
        (tmp_path / "hub").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match=message):
            published_files(tmp_path / name)
    folder = tmp_path / "model"
    SpeechCLForCTC(config).save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="has no README.md: a model goes to the Hub with its card"):
        published_files(folder)
    (folder / "README.md").write_text("---\ntitle: mine: a model\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its metadata cannot be read: mapping values"):
        published_files(folder)
    (folder / "README.md").write_text("# A model\n")
    published_files(folder)
    (folder / "modeling_speechcl.py").unlink()
    with pytest.raises(FileNotFoundError, match="has no modeling_speechcl.py"):
        published_files(folder)
    (folder / "modeling_speechcl.py").write_text("")
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModelForCTC"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map of .* lacks AutoModelForCTC"):
        published_files(folder)


def test_nothing_that_is_unpickled_is_published_or_downloaded():
    names = [*PUBLISHED, *hf_speechcl.hub.DOWNLOADED]
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", "*"))]


def test_nothing_of_this_machine_gets_into_files_or_logs(tmp_path, audio_folder, monkeypatch, caplog, capfd):
    home = tmp_path / "zyxhome"
    work = home / "qwxwork"
    work.mkdir(parents=True)
    corpus = audio_folder.rename(work / "recordings")
    lines = ["file_name,text", *(f"clip{number}.wav,ab" for number in range(4))]
    (corpus / "metadata.csv").write_text("\n".join(lines))
    secret = "hf_zyxsecret"
    for name, value in {"HOME": home, "USER": "zyxuser", "LOGNAME": "zyxuser", "HF_TOKEN": secret}.items():
        monkeypatch.setenv(name, str(value))
    caplog.set_level(logging.INFO)

    shared = [
        "--corpus",
        str(corpus),
        "--validation_fraction",
        "0.3",
        "--max_steps",
        "2",
        *FAST_RUN,
        "--hub_token",
        secret,
    ]
    shared += ["--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"]
    shared += ["--report_to", "tensorboard"]
    make_units(
        [
            "--corpus",
            str(corpus),
            "--validation_fraction",
            "0.3",
            "--num_units",
            "10",
            "--output_dir",
            str(work / "units"),
        ]
    )
    pretrain(
        ["--output_dir", str(work / "encoder"), "--encoder_options", *TINY_OPTIONS, "--objectives", "hubert",
         "--units", str(work / "units"), "--corrupt_input", "--noise_corpus", str(corpus), *shared]
    )  # fmt: skip
    tune = ["--model", str(work / "encoder"), "--output_dir", str(work / "ctc"), *shared]
    finetune_ctc(tune)
    again = run_script("finetune_ctc.py", *tune, "--resume_from_checkpoint", work / "ctc" / "checkpoint-1")
    scores = ["--device", "cpu", "--split", "train", "--output_file", str(work / "ctc" / "test.json")]
    evaluate(["--model", str(work / "ctc"), "--corpus", str(corpus), *scores])

    shown = capfd.readouterr()
    log = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("hf_speechcl"))
    texts = {"log": log, "stdout": shown.out + again.stdout, "stderr": shown.err + again.stderr}
    for folder in ("units", "encoder", "ctc"):
        files = [path for path in (work / folder).rglob("*") if path.is_file()]
        texts |= {str(path.relative_to(work)): path.read_bytes().decode("latin-1") for path in files}
    assert {"log", "units/units.json", "ctc/README.md", "encoder/options.json", "ctc/test.json"} <= set(texts)
    assert re.search(r"LOAD REPORT\S* from: encoder\n", texts["stderr"])  # of transformers, which names the path
    assert any("events.out" in name for name in texts)
    private = [secret, "zyxuser", "zyxhome", "qwxwork", str(tmp_path), str(ROOT), sys.prefix]
    leaks = [
        (name, text[max(0, place.start() - 60) : place.end() + 20])
        for name, text in texts.items()
        for word in private
        for place in re.finditer(re.escape(word), text)
    ]
    assert not leaks


def test_corpus_loads_by_its_name_on_the_hub(hub, audio_folder):
    load_demo().push_to_hub("tester/prompts")
    other = load_demo()["test"].rename_columns({"audio": "speech", "text": "sentence"})
    other.push_to_hub("tester/other", "clean", split="train")

    assert corpus_splits("tester/prompts") == ["train", "validation", "test"]
    train, validation = load_train_and_validation("tester/prompts", require_text=True)
    assert (len(train), len(validation)) == (406, 60)
    _, tenth = load_train_and_validation("tester/prompts", validation_split="validation[:10%]")
    assert tenth["id"] == validation["id"][:6]
    other = load_corpus("tester/other:clean", audio_column="speech", text_column="sentence")
    assert other.column_names == ["id", "audio", "text", "duration"]
    assert len(other) == 83
    assert other[0]["audio"]["bytes"]
    assert other[0]["text"]
    HfApi().create_repo("tester/files", repo_type="dataset")
    HfApi().upload_folder(repo_id="tester/files", repo_type="dataset", folder_path=audio_folder)
    assert corpus_splits("tester/files") == ["train"]
    files = load_corpus("tester/files", require_text=True)
    assert files["text"] == [f"text number {number}" for number in range(4)]
    assert min(files["duration"]) > 0
    with pytest.raises(FileNotFoundError, match="tester/absent"):
        load_corpus("tester/absent")
