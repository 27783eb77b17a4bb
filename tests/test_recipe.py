"""Recipes: what is wrong is named with its key and the nearest known one."""

import json
from pathlib import Path

import pytest

from variator_export.building.plan import parse_ratio, select_plugins
from variator_export.core.errors import UserError
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import (
    Layer,
    load_recipe,
    recipe_schema,
    resolve_recipe,
    shipped_recipes,
)

MINIMAL = "name: x\nbackbone: {source: ./b}\n"


def _load(tmp_path: Path, text: str) -> Recipe:
    (tmp_path / "r.yaml").write_text(text)
    return load_recipe(tmp_path / "r.yaml")


def test_the_default_recipe_comes_with_the_package_and_pins_its_backbone() -> None:
    assert "minilm" in shipped_recipes()
    recipe = load_recipe("minilm")
    assert recipe.backbone.sha256 == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert [plugin.recipe.ratio for plugin in select_plugins(recipe)] == [2, 4, 8]
    assert [plugin.source for plugin in recipe.plugins] == [f"recipes:minilm/ratio-{k}" for k in (2, 4, 8)]


@pytest.mark.parametrize("name", ["any-ratio", "ratio-1", "ratio-4"])
def test_names_that_mean_another_variant(tmp_path: Path, name: str) -> None:
    text = MINIMAL + f"plugins: [{{ratio: 2, name: {name}, initialise: {{}}}}]"
    with pytest.raises(UserError, match=f"ratio 2 cannot have the name {name}"):
        select_plugins(_load(tmp_path, text))


def test_a_folder_of_the_recipes_name_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("minilm").name == "minilm"


def test_sources_in_a_file_are_relative_to_the_file(tmp_path: Path) -> None:
    recipe = _load(tmp_path, MINIMAL + "plugins: [{source: p}]\n")
    assert recipe.backbone.source == str(tmp_path / "b")
    assert recipe.plugins[0].source == str(tmp_path / "p")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MINIMAL + "plugns: []", ["unknown key 'plugns'", "did you mean 'plugins'?"]),
        ("name: x\nbackbone: {sorce: a}", ["unknown key 'backbone.sorce'", "did you mean 'source'?"]),
        (MINIMAL + "plugins: [{ratio: 2, initialise: {sed: 1}}]", ["plugins.0.initialise.sed", "'seed'"]),
        (MINIMAL + "ratios: [2, four]", ["'ratios.1' is 'four'", "valid integer"]),
        (MINIMAL + "ratios: 4", ["'ratios' is 4", "valid tuple"]),
        (MINIMAL + "ratios: [0]", ["'ratios.0' is 0"]),
        (MINIMAL + "precision: fp4", ["'precision' is 'fp4'", "float32"]),
        ("name: x\n", ["'backbone' is missing"]),
        ("name: ../x\nbackbone: {source: b}", ["'name' is '../x'"]),
        ("name: x\nbackbone: {source: b, sha256: abc}", ["'backbone.sha256' is 'abc'"]),
        (MINIMAL + "plugins: [{ratio: 2}]", ["either a source or initialise"]),
        (MINIMAL + "plugins: [{initialise: {}}]", ["needs a ratio"]),
        (MINIMAL + "engine: {profiles: {a: {batch_size: [4, 2, 8]}}}", ["min <= opt <= max", "4, 2, 8"]),
        ("[1, 2]", ["is not a mapping"]),
        ("name: [", ["not valid YAML"]),
        ("name: {{ name }}", ["not valid YAML"]),
        ("[" * 4000, ["not valid YAML"]),
        (MINIMAL + "name: y\n", ["the key 'name' appears twice", "line 3"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        _load(tmp_path, text)
    for word in words:
        assert word in raised.value.message


def test_a_recipe_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="There is no recipe minilmm") as raised:
        load_recipe("minilmm")
    assert "minilm" in str(raised.value.hint)
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe("nowhere/recipe.yaml")


@pytest.mark.parametrize("text", ["0", "1.5", "-4", "four", ""])
def test_a_ratio_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="not a whole number of at least 1"):
        parse_ratio(text)


def test_a_ratio_without_a_plugin_lists_those_there_are() -> None:
    recipe = load_recipe("minilm").model_copy(update={"ratios": (1000,)})
    with pytest.raises(UserError, match=r"no plugin of ratio 1000; there are plugins of the ratios 2, 4, 8"):
        select_plugins(recipe)


def test_a_name_used_twice(tmp_path: Path) -> None:
    text = MINIMAL + "plugins: [{ratio: 2, initialise: {}}, {ratio: 2, initialise: {seed: 1}}]"
    with pytest.raises(UserError, match="ratio-2 is used twice"):
        select_plugins(_load(tmp_path, text))
    named = MINIMAL + "plugins: [{ratio: 2, initialise: {}}, {name: b, ratio: 2, initialise: {seed: 1}}]"
    assert [plugin.recipe.name for plugin in select_plugins(_load(tmp_path, named))] == ["b", "ratio-2"]


def test_the_committed_schema_is_that_of_the_recipe() -> None:
    """After a change: variator-export schema > recipes/recipe.schema.json"""
    folder = Path(__file__).parent.parent / "recipes"
    schema = json.loads((folder / "recipe.schema.json").read_text(encoding="utf-8"))
    assert schema == recipe_schema()
    for path in folder.glob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith(
            "# yaml-language-server: $schema=recipe.schema.json"
        )
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        fields = part["properties"].items()
        undescribed = [name for name, field in fields if not {"description", "$ref"} & field.keys()]
        assert not undescribed


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_recipe_goes_over_the_one_that_it_extends(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    _write(
        tmp_path,
        base="name: base\nbackbone: {source: ./b, task: fill-mask}\nverify: {seed: 3, texts: [one]}\n"
        "plugins: [{source: p}]\nspeed: {rounds: 9}\n",
        middle="extends: base.yaml\nname: middle\nverify: {texts: [two, three]}\nratios: [2]\n",
    )
    _write(tmp_path / "sub", top="extends: ../middle.yaml\nname: top\nspeed: null\nratios: [4]\n")
    found = resolve_recipe(tmp_path / "sub" / "top.yaml", [Layer("--ratio", {"ratios": [8]})])
    recipe = found.recipe
    assert (recipe.name, recipe.backbone.task, recipe.ratios, recipe.speed) == (
        "top",
        "fill-mask",
        (8,),
        None,
    )
    assert recipe.verify.model_dump() == {"seed": 3, "texts": ("two", "three")}
    # Each file's sources are relative to itself.
    assert recipe.backbone.source == str(tmp_path / "b")
    assert recipe.plugins[0].source == str(tmp_path / "p")
    origins = {key: Path(found.origin(key)).name for key in ("name", "verify.seed", "verify.texts", "speed")}
    assert origins == {
        "name": "top.yaml",
        "verify.seed": "base.yaml",
        "verify.texts": "middle.yaml",
        "speed": "top.yaml",
    }
    assert (found.origin("ratios"), found.origin("engine.batch_size")) == ("--ratio", "default")


def test_a_recipe_may_extend_one_of_the_package_and_takes_no_pin_along(tmp_path: Path) -> None:
    _write(
        tmp_path,
        same="extends: minilm\nname: same\nratios: [4]\n",
        other="extends: minilm\nname: other\nbackbone: {source: ./mine}\n",
    )
    assert load_recipe(tmp_path / "same.yaml").backbone == load_recipe("minilm").backbone
    other = load_recipe(tmp_path / "other.yaml")
    assert (other.backbone.source, other.backbone.sha256) == (str(tmp_path / "mine"), None)
    assert other.plugins == load_recipe("minilm").plugins


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: a.yaml\nname: a", "Recipes extend each other in a circle: a.yaml extends a.yaml"),
        ("extends: minilmm\nname: a", "There is no recipe minilmm"),
        ("extends: gone.yaml\nname: a", "gone.yaml cannot be read"),
        ("extends: minilm", "has no name of its own"),
        ("extends: [minilm]\nname: a", r"'extends' is \['minilm'\]"),
        ("extends: minilm\nname: a\nengin: {}", "unknown key 'engin'; did you mean 'engine'"),
        ("extends: minilm\nname: a\nbackbone: mine", "'backbone' is 'mine'"),
    ],
)
def test_what_is_wrong_with_extending(tmp_path: Path, text: str, words: str) -> None:
    _write(tmp_path, a=text)
    with pytest.raises(UserError, match=words):
        load_recipe(tmp_path / "a.yaml")


def test_the_shown_recipe_is_one_and_says_where_each_value_comes_from(tmp_path: Path) -> None:
    _write(
        tmp_path,
        a="extends: minilm\nname: a\nverify: {texts: ['Straße: #1', 'no']}\n"
        "engine: {profiles: {a: {batch_size: [1, 2, 3]}}}",
    )
    found = resolve_recipe(tmp_path / "a.yaml", [Layer("--no-speed", {"speed": None})])
    text = found.to_yaml()
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == found.recipe
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["speed"].endswith("# --no-speed")
    assert lines["sha256"].endswith("# minilm")
    assert lines["batch_size"].endswith("a.yaml")
    assert lines["sequence_length"].endswith("# default")


def test_every_key_of_the_recipe_below_may_be_left_out_of_one_that_extends_it() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["name"]
    assert {"required": ["extends"]} in schema["anyOf"]
    assert "extends" in schema["properties"]
