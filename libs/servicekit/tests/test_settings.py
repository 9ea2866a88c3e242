"""Settings from files, environment and flags, and their errors."""

from pathlib import Path

import pytest
from pydantic import Field, model_validator

from servicekit.errors import InvalidArgument
from servicekit.settings import Section, load


class Demo(Section):
    """A section for these tests."""

    depth: int = Field(3, ge=0)
    colours: list[str] = []
    name: str = ""
    folder: Path = Path("/x")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "crisp.toml"
    path.write_text(
        "[image]\ndepth = 4\n[node]\nlog_level = 'debug'\n[net]\nanything = 'is another service’s business'\n"
    )
    return path


def test_each_source_overrides_the_one_before(file: Path) -> None:
    assert load("image", Demo, [], {}).own.depth == 3
    arguments = ["--config", str(file)]
    assert load("image", Demo, arguments, {}).own.depth == 4
    drop_ins = Path(f"{file}.d")
    drop_ins.mkdir()
    (drop_ins / "10-first.toml").write_text("[image]\ndepth = 5\n")
    (drop_ins / "20-second.toml").write_text("[image]\ndepth = 6\n")
    assert load("image", Demo, arguments, {}).own.depth == 6
    environment = {
        "CRISP_IMAGE_DEPTH": "7",
        "CRISP_IMAGE_NAME": "64001",
        "CRISP_IMAGE_COLOURS": '["red"]',
        "HOME": "/root",
        "CRISP_CRASHPOINTS": "/x",
    }
    settings = load("image", Demo, arguments, environment)
    assert (settings.own.depth, settings.own.colours, settings.own.name) == (7, ["red"], "64001")
    assert load("image", Demo, [*arguments, "--set", "image.depth=8"], environment).own.depth == 8
    assert settings.node.log_level == "debug"


def test_an_unknown_key_names_the_file_and_the_nearest_one(file: Path) -> None:
    file.write_text("[image]\ndepht = 4\n")
    with pytest.raises(InvalidArgument) as caught:
        load("image", Demo, ["--config", str(file)], {})
    assert str(file) in caught.value.message
    assert "'depht'" in caught.value.message
    assert "did you mean 'depth'?" in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[imgae]\n", "did you mean 'image'?"),
        ("depth = 4\n", "stands outside of any section"),
        ("[image]\ndepth = 'deep'\n", "image.depth = 'deep'"),
        ("[image]\ndepth = -1\n", "image.depth = -1"),
        ("[image\n", "crisp.toml"),
    ],
)
def test_errors_name_the_file_and_the_value(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=".") as caught:
        load("image", Demo, ["--config", str(file)], {})
    assert said in caught.value.message


def test_flags_and_environment_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="environment variable CRISP_IMAGE_DEPHT"):
        load("image", Demo, [], {"CRISP_IMAGE_DEPHT": "1"})
    with pytest.raises(InvalidArgument, match=r"SECTION\.KEY=VALUE"):
        load("image", Demo, ["--set", "depth"], {})
    with pytest.raises(InvalidArgument, match="does not exist"):
        load("image", Demo, ["--config", str(tmp_path / "none.toml")], {})


class Pair(Section):
    """Two keys that must agree."""

    names: list[str] = ["one"]
    first: str = "one"

    @model_validator(mode="after")
    def _together(self) -> "Pair":
        if self.first not in self.names:
            raise ValueError(f"first {self.first!r} is none of names: {', '.join(self.names)}")
        return self


def test_keys_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"image: .*first 'one' is none of names: two"):
        load("image", Pair, ["--set", "image.names=['two']"], {})
