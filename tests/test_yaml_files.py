"""Every YAML file of the project is read by one function, which refuses duplicate keys."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fastcpt import gpus
from fastcpt.planning import measured
from fastcpt.recipe import RecipeError, load_recipe
from fastcpt.reporting.record import RecordError, recipe_of
from fastcpt.yaml_files import YamlError, read_yaml

REPOSITORY = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "mine.yaml:3: the key 'a' stands here again, first in line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "mine.yaml:4: the key 'a.b' stands here again"),
        ("a: {b: 1, b: 1}\n", "mine.yaml:1: the key 'a.b' stands here again"),
        ("- {b: 1}\n- {b: 1, c: 2,\n   'b': 3}\n", "mine.yaml:3: the key 'b' stands here again"),
        ("true: 1\nyes: 2\n", "mine.yaml:2: the key 'yes' stands here again, first in line 1"),
        ("a: &x {b: 1, b: 2}\nc: *x\n", "mine.yaml:1: the key 'a.b' stands here again"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(YamlError) as refused:
        read_yaml(write(tmp_path, text))
    assert str(refused.value).startswith(message)


def test_what_is_merged_in_may_be_overridden(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  b: 3\nagain: *base\n"
    assert read_yaml(write(tmp_path, text)) == {
        "base": {"a": 1, "b": 2},
        "own": {"a": 1, "b": 3},
        "again": {"a": 1, "b": 2},
    }


def test_numbers_are_what_people_write(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "a: 3e-5\nb: 1_000\nc: '3e-5'\n")) == {
        "a": 3e-5,
        "b": 1000,
        "c": "3e-5",
    }


def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, "")) is None


@pytest.mark.parametrize("text", ["a: [\n", "a: !!python/object:os.system {}\n", "a: \x00\n"])
def test_what_is_no_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(YamlError, match=r"^mine\.yaml.*not valid YAML"):
        read_yaml(write(tmp_path, text))


def test_a_second_training_section_erases_nothing_silently(tmp_path: Path) -> None:
    text = "description: x\ntraining:\n  max_steps: 100\n  warmup_steps: 5\ntraining:\n  seed: 1\n"
    with pytest.raises(RecipeError) as refused:
        load_recipe(write(tmp_path, text))
    assert str(refused.value).startswith(
        "mine.yaml:5: the key 'training' stands here again, first in line 2"
    )


def test_the_tables_of_the_plan_are_read_so_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [(gpus, "TABLE", "table"), (measured, "MEASURED", "measured_rows")]
    for module, name, function in tables:
        text = getattr(module, name).read_text()
        monkeypatch.setattr(module, name, write(tmp_path, f"{text}\n{text}"))
        read = getattr(module, function)
        read.cache_clear()
        with pytest.raises(YamlError, match=r"^mine\.yaml:\d+: the key '\w+' stands here again"):
            read()
        monkeypatch.undo()
        read.cache_clear()


def test_a_records_recipe_is_read_so_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(RecordError, match=r"recipe\.yaml is damaged.*the key 'name' stands"):
        recipe_of(tmp_path)


def test_every_yaml_file_of_the_project_has_each_key_once() -> None:
    listed = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "*.yaml", "*.yml"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "docker-compose.yaml" in listed
    for name in listed:
        assert isinstance(read_yaml(REPOSITORY / name), dict), name
