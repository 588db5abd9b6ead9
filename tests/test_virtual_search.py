"""``loadstone sim --virtual`` from the command line."""

from pathlib import Path

import pytest

from loadstone.cli.main import main
from loadstone.measure.runs import RunFolder

COMMAND = ["sim", "--virtual", "--profile", "sharp-knee", "--levels", "1,2", "--out", "run", "--quiet"]


@pytest.mark.parametrize(
    ("flags", "lengths"),
    [([], (512, 128)), (["--random-input-len", "64", "--random-output-len", "16"], (64, 16))],
)
def test_lengths_are_the_profiles_own_or_given(
    flags: list[str], lengths: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*COMMAND, *flags]) == 0
    written = RunFolder(Path("run")).read_run()
    data = written["settings"]["data"]
    assert (data["random_input_len"], data["random_output_len"]) == lengths
    assert written["command"] == " ".join(["loadstone", *COMMAND, *flags])
