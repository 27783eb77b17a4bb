"""The hub: sources pinned to a commit, its errors, its cache, and pushing. Against a stand-in server."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import call, call_process
from stand_in_hub import Repository, StandInHub, serve
from test_assemble import random_modules

from variator_export.core.errors import UserError
from variator_export.core.hub import HubSource, parse_hub_source
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.modular.weights import save_modules
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe_file import load_recipe
from variator_export.text.tokenizer import TextEncoder

MODEL, PLUGINS = "acme/small-bert", "acme/plugins"


@pytest.fixture
def hub() -> Iterator[StandInHub]:
    with serve() as found:
        yield found


@pytest.fixture
def filled(hub: StandInHub, embedding_model: Path, embedding_plugins: dict[int, Path]) -> StandInHub:
    """A hub with a model, whose weights are there as a pickle too, and a repository with two plugins."""
    hub.put_folder(MODEL, embedding_model)
    files = hub.repositories[MODEL].files("main")
    hub.repositories[MODEL].commit({**files, "pytorch_model.bin": b"code", "onnx/model.onnx": b"large"})
    plugins = {
        f"ratio-{ratio}/{path.name}": path.read_bytes()
        for ratio, folder in embedding_plugins.items()
        for path in folder.iterdir()
    }
    hub.repositories[PLUGINS] = Repository()
    hub.repositories[PLUGINS].commit(plugins)
    return hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:a/b", HubSource("a/b")),
        ("a/b@v1.0", HubSource("a/b", revision="v1.0")),
        ("hub:a/b@refs/pr/3", HubSource("a/b", revision="refs/pr/3")),
        ("hub:a/b/ratio-4@main", HubSource("a/b", "ratio-4", "main")),
        ("hub:t5-base", HubSource("t5-base")),
    ],
)
def test_how_a_source_is_written(text: str, expected: HubSource) -> None:
    assert parse_hub_source(text) == expected
    assert parse_hub_source(str(expected)) == expected


@pytest.mark.parametrize("text", ["hub:", "hub:/a/b", "hub:a/../b", "hub:a/b@", "hub:a b/c"])
def test_what_is_no_source(text: str) -> None:
    with pytest.raises(UserError, match="is not a repository of the hub"):
        parse_hub_source(text)


def test_an_id_in_a_recipe_is_a_folder_only_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "name: x\nbackbone: {source: org/model@v2}\nplugins: [{source: org/plugin}, {source: ./org/plugin}]"
    )
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.backbone.source == "hub:org/model@v2"
    assert [plugin.source for plugin in recipe.plugins] == ["hub:org/plugin", str(tmp_path / "org/plugin")]
    (tmp_path / "sub.yaml").write_text("name: x\nbackbone: {source: ./model}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.yaml").rename(tmp_path / "sub" / "r.yaml")
    assert load_recipe("sub/r.yaml").backbone.source == "./sub/model", "no repository"
    (tmp_path / "org" / "plugin").mkdir(parents=True)
    assert load_recipe(tmp_path / "r.yaml").plugins[0].source == str(tmp_path / "org/plugin")


def test_a_build_from_the_hub_is_pinned_cached_and_repeated_offline(
    filled: StandInHub, tmp_path: Path
) -> None:
    environment = filled.environment(tmp_path / "cache")
    command = ["build", "--backbone", MODEL, "--plugin", f"hub:{PLUGINS}/ratio-4", "--output", "bundle"]
    command += ["--target", "onnxruntime", "--no-speed", "--format", "json"]
    result = call_process(*command, cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    commit, plugins = (filled.repositories[name].refs["main"] for name in (MODEL, PLUGINS))
    assert manifest["backbone"]["source"] == f"hub:{MODEL}@{commit}"
    (part,) = manifest["backbone"]["parts"].values()
    assert "sentence_embedding" in {
        output["name"] for output in part["outputs"]
    }  # the pooling's files were read too
    assert manifest["recipe"]["plugins"][0]["source"] == f"hub:{PLUGINS}/ratio-4@{plugins}"
    read = {
        line.rpartition("/")[2] for line in filled.requests if line.startswith("GET") and "resolve" in line
    }
    assert {"model.safetensors", "plugin.safetensors"} <= read
    assert not {"pytorch_model.bin", "model.onnx"} & read
    assert not any("ratio-2" in line for line in filled.requests)

    filled.requests.clear()
    assert json.loads(call(*command, cwd=tmp_path, environment=environment).stdout)["published"] is False
    assert not any("resolve" in line for line in filled.requests)

    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    filled.requests.clear()
    again = call(*command, "--replace", cwd=tmp_path, environment=offline)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text()) == manifest
    assert filled.requests == []

    diagnosis = call("doctor", "bundle", cwd=tmp_path, environment=environment)
    assert "its backbone is here" in diagnosis.stdout
    elsewhere = call("doctor", "bundle", cwd=tmp_path, environment=filled.environment(tmp_path / "other"))
    assert "its backbone is not here" in elsewhere.stdout
    assert filled.requests == []

    # A commit needs no network either; a branch does, because it may have moved.
    filled.broken = 503
    pinned = [
        part.replace(MODEL, f"{MODEL}@{commit}").replace("ratio-4", f"ratio-4@{plugins}") for part in command
    ]
    assert call(*pinned, cwd=tmp_path, environment=environment).returncode == 0
    refused = call(*command, cwd=tmp_path, environment=environment)
    assert (refused.returncode, "The hub returned 503" in refused.stderr) == (1, True)


def test_a_branch_that_moved_is_another_backbone(
    filled: StandInHub, small_model: Callable[[str], Path], tmp_path: Path
) -> None:
    environment = filled.environment(tmp_path / "cache")
    command = ["build", "--backbone", MODEL, "--ratio", "1", "--output", "bundle"]
    command += ["--target", "onnxruntime", "--no-speed"]
    assert call(*command, cwd=tmp_path, environment=environment).returncode == 0
    filled.put_folder(MODEL, small_model("roberta"))
    result = call(*command, cwd=tmp_path, environment=environment)
    assert result.returncode == 1
    assert "The bundle is of another backbone: hub:acme/small-bert@" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["acme/none"],
            "There is no folder acme/none, and: The hub has no repository acme/none, or you may not read it",
        ),
        ([f"hub:{MODEL}@v9"], "has no revision v9"),
        (["hub:acme/gated"], "is gated"),
        (["hub:acme/private"], "or you may not read it"),
        (["hub:acme/pickled"], "has no model.safetensors, only pytorch_model.bin, which can run code"),
        ([f"hub:{PLUGINS}"], "has no config.json; it has ratio-2/"),
        ([MODEL, "--plugin", f"hub:{PLUGINS}/ratio-16"], "has no plugin_config.json; it has nothing"),
        ([MODEL, "--plugin", "missing/ratio-4"], "There is no folder missing/ratio-4, and: The hub has no"),
    ],
)
def test_what_the_hub_does_not_give(
    filled: StandInHub, tmp_path: Path, arguments: list[str], words: str
) -> None:
    files = filled.repositories[MODEL].files("main")
    for name, options in {"gated": {"gated": True}, "private": {"private": True}, "pickled": {}}.items():
        filled.repositories[f"acme/{name}"] = Repository(**options)
        filled.repositories[f"acme/{name}"].commit(files)
    del filled.repositories["acme/pickled"].commits[filled.repositories["acme/pickled"].refs["main"]][
        "model.safetensors"
    ]
    result = call(
        "build",
        "--output",
        "out",
        "--target",
        "onnxruntime",
        "--backbone",
        *arguments,
        cwd=tmp_path,
        environment=filled.environment(tmp_path / "c"),
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "hint: " in result.stderr
    assert not (tmp_path / "out").exists()
    assert not any(line.endswith("pytorch_model.bin") for line in filled.requests)


def test_a_token_opens_what_is_private(filled: StandInHub, tmp_path: Path) -> None:
    filled.repositories[MODEL].private = filled.repositories[MODEL].gated = True
    command = ["build", "--backbone", f"hub:{MODEL}", "--ratio", "1", "--output", "out", "--no-speed"]
    command += ["--target", "onnxruntime"]
    environment = filled.environment(tmp_path / "c", HF_TOKEN="hf_reader")
    assert call(*command, cwd=tmp_path, environment=environment).returncode == 0


def test_a_download_that_breaks_off(filled: StandInHub, tmp_path: Path) -> None:
    filled.cut = "model.safetensors"
    command = ["build", "--backbone", f"hub:{MODEL}", "--ratio", "1", "--output", "out", "--no-speed"]
    command += ["--target", "onnxruntime"]
    environment = filled.environment(tmp_path / "c", HF_HUB_DOWNLOAD_TIMEOUT="2")
    result = call(*command, cwd=tmp_path, environment=environment)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    filled.cut = None
    assert call(*command, cwd=tmp_path, environment=environment).returncode == 0


def test_push_without_a_network_ends_at_once(bundle_copy: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "c"), "HF_TOKEN": "hf_writer"}
    started = time.monotonic()
    result = call("push", str(bundle_copy), "acme/bundle", environment=nowhere)
    assert result.returncode == 1
    assert "The hub cannot be reached" in result.stderr
    assert "Retry" not in result.stderr
    assert time.monotonic() - started < 10


def test_without_a_network_and_offline(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "c")}
    result = call("build", "--backbone", "hub:a/b", "--output", "out", cwd=tmp_path, environment=nowhere)
    assert result.returncode == 1
    assert "The hub cannot be reached for hub:a/b" in result.stderr
    assert "HF_HUB_OFFLINE=1 uses the files that earlier runs cached" in result.stderr
    result = call(
        "build",
        "--backbone",
        "hub:a/b",
        "--output",
        "out",
        cwd=tmp_path,
        environment={**nowhere, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 1
    assert "is not complete in the cache, and HF_HUB_OFFLINE forbids" in result.stderr


def test_a_bundle_is_pushed_whole_and_runs_from_there(
    hub: StandInHub, bundle_copy: Path, tmp_path: Path
) -> None:
    hub.writers = {"hf_writer"}
    environment = hub.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    result = call("push", str(bundle_copy), "acme/bundle", "--format", "json", environment=environment)
    assert result.returncode == 0, result.stderr
    pushed = json.loads(result.stdout)["pushed"]
    files = hub.repositories["acme/bundle"].files("main")
    local = {p.relative_to(bundle_copy).as_posix() for p in bundle_copy.rglob("*") if p.is_file()}
    # Not the path of the backbone on the machine that built the bundle.
    assert set(files) == (local - {"reports/backbone.json"}) | {"README.md", ".gitattributes"}
    assert pushed["files"] == len(local)  # and a card
    assert "library_name: variator-export" in files["README.md"].decode()
    assert "`BertModel` from `bert" in files["README.md"].decode(), "and not from where it lies"
    assert "| ratio-4 | original | 4 | initialised only | ratio-4.onnx |" in files["README.md"].decode()

    # As a user gets it: hf download REPOSITORY --local-dir FOLDER
    for name, content in files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    assert call("run", str(tmp_path / "got"), "--ratio", "4", "--text", "Seven.").returncode == 0


def test_a_bundle_of_the_hub_is_opened_by_its_name(
    hub: StandInHub, bundle_copy: Path, tmp_path: Path
) -> None:
    hub.writers = {"hf_writer"}
    environment = hub.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    assert call("push", str(bundle_copy), "acme/bundle", environment=environment).returncode == 0
    commit = hub.repositories["acme/bundle"].refs["main"]
    command = ["--ratio", "4", "--text", "Seven.", "--format", "json"]
    wanted = call("run", str(bundle_copy), *command).stdout
    for name in ("acme/bundle", "hub:acme/bundle", f"acme/bundle@{commit}"):
        result = call("run", name, *command, cwd=tmp_path, environment=environment)
        assert result.returncode == 0, result.stderr
        assert result.stdout == wanted
    copies = [path for path in (tmp_path / "c").rglob("manifest.json") if not path.is_symlink()]
    assert [path.parent.name for path in copies] == [commit], "one copy for each commit"
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert call("run", "acme/bundle", *command, cwd=tmp_path, environment=offline).stdout == wanted
    # The folder of that name comes first; what is no bundle is refused.
    shutil.copytree(bundle_copy, tmp_path / "acme" / "bundle")
    hub.broken = 503
    assert call("run", "acme/bundle", *command, cwd=tmp_path, environment=environment).stdout == wanted
    hub.broken = None
    hub.put_folder("acme/other", bundle_copy / "plugins" / "ratio-2")
    for name, words in (("acme/other", "has no manifest.json"), ("acme/none", "The hub has no repository")):
        refused = call("run", name, *command, cwd=tmp_path, environment=environment)
        assert (refused.returncode, words in refused.stderr) == (1, True), refused.stderr


def test_a_folder_of_the_hubs_cache_is_copied_with_a_message(
    hub: StandInHub, bundle_copy: Path, tmp_path: Path
) -> None:
    hub.writers = {"hf_writer"}
    environment = hub.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    assert call("push", str(bundle_copy), "acme/bundle", environment=environment).returncode == 0
    command = ["--ratio", "4", "--text", "Seven.", "--format", "json"]
    wanted = call("run", "acme/bundle", *command, cwd=tmp_path, environment=environment).stdout
    (snapshot,) = (tmp_path / "c" / "hub" / "models--acme--bundle" / "snapshots").iterdir()
    assert (snapshot / "weights.safetensors").is_symlink()
    shutil.rmtree(tmp_path / "c" / "variator-export")
    first, second = (call_process("run", str(snapshot), *command, environment=environment) for _ in range(2))
    assert (first.stdout, second.stdout) == (wanted, wanted), first.stderr
    assert "consists of links, which ONNX Runtime refuses: copied to" in first.stderr
    assert "copied" not in second.stderr
    # The copy is that of the name.
    before = sorted(tmp_path.rglob("any-ratio.onnx"))
    assert call("run", "acme/bundle", *command, cwd=tmp_path, environment=environment).stdout == wanted
    assert sorted(tmp_path.rglob("any-ratio.onnx")) == before


def test_a_push_takes_files_of_the_bundle_before_away_and_nothing_else(
    hub: StandInHub, bundle_copy: Path, tmp_path: Path
) -> None:
    hub.writers = {"hf_writer"}
    environment = hub.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    assert call("push", str(bundle_copy), "acme/bundle", environment=environment).returncode == 0
    repository = hub.repositories["acme/bundle"]
    first_card = repository.files("main")["README.md"]
    repository.commit({**repository.files("main"), "notes.txt": b"mine"})
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("ratio-2.onnx", "reference/ratio-2.safetensors"):
        del manifest["files"][name]
    del manifest["variants"][1]
    path.write_text(json.dumps(manifest))
    result = call("push", str(bundle_copy), "acme/bundle", environment=environment)
    assert "2 earlier files removed" in result.stdout, result.stderr
    files = repository.files("main")
    assert "ratio-2.onnx" not in files
    assert files["notes.txt"] == b"mine"
    rows = [line for line in first_card.decode().splitlines() if "ratio-2" not in line]
    assert files["README.md"].decode().splitlines() == rows, "the card is written again"
    repository.commit({**files, "README.md": b"mine"})
    assert call("push", str(bundle_copy), "acme/bundle", environment=environment).returncode == 0
    assert repository.files("main")["README.md"] == b"mine"


def test_plugins_are_pushed_and_used_from_there(
    hub: StandInHub, embedding_plugins: dict[int, Path], embedding_model: Path, tmp_path: Path
) -> None:
    hub.writers = {"hf_writer"}
    environment = hub.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    for ratio, folder in embedding_plugins.items():
        shutil.copytree(folder, tmp_path / "plugins" / f"ratio-{ratio}")
    assert (
        call("push", str(tmp_path / "plugins"), PLUGINS, "--private", environment=environment).returncode == 0
    )
    assert hub.repositories[PLUGINS].private
    assert (
        call("push", str(tmp_path / "plugins" / "ratio-2"), "acme/one", environment=environment).returncode
        == 0
    )
    assert "plugin.safetensors" in hub.repositories["acme/one"].files("main")
    command = ["build", "--backbone", str(embedding_model), "--output", "out", "--no-speed", "--target"]
    command += ["onnxruntime", "--plugin", f"hub:{PLUGINS}/ratio-4", "--plugin", "hub:acme/one"]
    result = call(*command, "--push-to-hub", "acme/built", cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert {"ratio-2.onnx", "ratio-4.onnx"} <= hub.repositories["acme/built"].files("main").keys()


def test_modules_are_pushed_and_built_from_the_hub(
    filled: StandInHub, embedding_model: Path, tmp_path: Path
) -> None:
    filled.writers = {"hf_writer"}
    environment = filled.environment(tmp_path / "cache", HF_TOKEN="hf_writer")
    source = resolve_source(str(embedding_model))
    backbone = load_backbone(read_backbone_info(source), TextEncoder(embedding_model).pad_token_id)
    save_modules(random_modules(backbone, 2), tmp_path / "modules/g2")
    pushed = call("push", str(tmp_path / "modules"), "acme/modules", environment=environment)
    assert pushed.returncode == 0, pushed.stderr
    assert {"g2/modules.safetensors", "g2/module_config.json"} <= filled.repositories["acme/modules"].files(
        "main"
    ).keys()
    built = call(
        "build", "--backbone", str(embedding_model), "--output", "out", "--no-speed",
        "--target", "onnxruntime", "--module", "hub:acme/modules/g2", "--assembly", "half=2",
        cwd=tmp_path, environment=environment,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "out/half.onnx").is_file()
    broken = tmp_path / "modules/g2/modules.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    again = call("push", str(tmp_path / "modules"), "acme/modules", environment=environment)
    assert again.returncode == 1
    assert "is not a whole safetensors file" in again.stderr


def test_what_is_not_pushed(filled: StandInHub, bundle_copy: Path, tmp_path: Path) -> None:
    filled.writers = {"hf_writer"}
    writer = filled.environment(tmp_path / "c", HF_TOKEN="hf_writer")
    reader = filled.environment(tmp_path / "c", HF_TOKEN="hf_reader")
    before = {name: dict(r.refs) for name, r in filled.repositories.items()}
    bundle = str(bundle_copy)
    for environment, arguments, words in (
        (reader, [bundle, "acme/new"], "The hub does not let you write acme/new"),
        (writer, [bundle, PLUGINS], "holds something else: ratio-2/"),
        (writer, [bundle, MODEL], "holds something else: 1_Pooling/config.json"),
        (writer, [bundle, "acme/new/folder"], "names a folder inside a repository"),
        (writer, [bundle, "acme"], "names no organisation"),
        (writer, [str(tmp_path), "acme/new"], "holds neither a bundle nor a plugin"),
        (writer, ["nowhere", "acme/new"], "There is no folder nowhere"),
    ):
        result = call("push", *arguments, environment=environment)
        assert (result.returncode, words in result.stderr) == (1, True), result.stderr
    (bundle_copy / "ratio-4.onnx").write_bytes((bundle_copy / "ratio-4.onnx").read_bytes()[:-1] + b"x")
    result = call("push", bundle, "acme/new", environment=writer)
    assert (result.returncode, "has the sha256" in result.stderr) == (1, True)
    assert {name: dict(r.refs) for name, r in filled.repositories.items()} == before


def test_a_push_that_fails_after_a_build_says_how_to_do_it_again(
    filled: StandInHub, embedding_model: Path, tmp_path: Path
) -> None:
    command = ["build", "--backbone", str(embedding_model), "--ratio", "1", "--target", "onnxruntime"]
    command += ["--no-speed", "--output", "out", "--push-to-hub"]
    for repository, words in (
        ("acme/new", "No token for the hub is set"),
        ("acme", "names no organisation"),
    ):
        result = call(*command, repository, cwd=tmp_path, environment=filled.environment(tmp_path / "c"))
        assert (result.returncode, words in result.stderr) == (1, True), result.stderr
        assert not (tmp_path / "out").exists(), "it is refused before the work"
    filled.writers = {"hf_writer"}
    environment = filled.environment(tmp_path / "c", HF_TOKEN="hf_reader")
    result = call(*command, "acme/new", cwd=tmp_path, environment=environment)
    assert result.returncode == 1
    assert "out is complete, but was not pushed" in result.stderr
    assert f"variator-export push {tmp_path / 'out'} acme/new" in result.stderr
    assert (tmp_path / "out" / "manifest.json").is_file()
