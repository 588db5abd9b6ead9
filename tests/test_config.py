"""The configuration file: which of its keys hold for a verb, what beats what, and that no key is idle."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from loadstone.cli.config import Config
from loadstone.cli.main import build_app, known_flags, main
from loadstone.core.errors import UsageError

KNOWN = known_flags()


def settings(text: str, verb: str = "find") -> Mapping[str, Any]:
    return Config(Path("my.toml"), tomllib.loads(text)).settings_of(verb, KNOWN)


@pytest.mark.parametrize(
    ("text", "verb", "holds"),
    [
        ("seed = 3\nmax_ttft_ms = 500", "find", {"seed": 3, "max-ttft-ms": 500}),
        ("num-prompts = 3\nseed = 4", "find", {"seed": 4}),
        ("seed = 3\n[find]\nseed = 4\n[rate]\nseed = 5", "find", {"seed": 4}),
        ("seed = 3\n[find]\nseed = 4\n[rate]\nseed = 5", "rate", {"seed": 5}),
        ("seed = 3\n[find]\nseed = 4", "bench", {"seed": 3}),
        ("levels = [1, 2, 5]", "rate", {"levels": "1,2,5"}),
        ("slo = ['tpot:p99:50', 'itl:mean:9']", "find", {"slo": ["tpot:p99:50", "itl:mean:9"]}),
        ("tolerance = 0.1", "compare", {"tolerance": 0.1}),
        ("port = 1\n[serve.embed]\nport = 2\nworkers = 3", "serve embed", {"port": 2, "workers": 3}),
        ("port = 1\n[serve.embed]\nport = 2\nworkers = 3", "serve chat", {"port": 1}),
    ],
)
def test_what_holds_for_a_verb(text: str, verb: str, holds: Mapping[str, Any]) -> None:
    assert settings(text, verb) == holds


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("levls = '1,2'", "my.toml: no command knows the key levls; did you mean levels?"),
        ("preset = 'quick'", "my.toml: no command knows the key preset"),
        ("[find]\nnum-prompts = 3", "my.toml: loadstone find does not know the key num-prompts"),
        ("[find.levels]\nlow = 3", "my.toml: loadstone find does not know the key levels"),
        ("[serve.chat]\nqueue = 3", "my.toml: loadstone serve chat does not know the key queue"),
        ("[serve]\nport = 3", "my.toml: no command is called [serve]; there are demo, find"),
        ("[serve.images]\nport = 3", "my.toml: no command is called [serve images]; there are"),
        ("[seed]\nlow = 3", "my.toml: no command is called [seed]; there are demo, find, bench"),
    ],
)
def test_a_key_that_nothing_knows(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(text, "sim")
    assert str(caught.value).startswith(says)


def given_to(verb: str, *flags: str, file: Mapping[str, Any]) -> Mapping[str, Any]:
    _, bound, _ = build_app(verb, file, "my.toml").parse_args([verb, *flags], exit_on_error=False, print_error=False)
    return bound.arguments


def test_a_flag_beats_the_environment_which_beats_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = {"levels": "1,2", "target-qps": 3.0, "resolution": 0.2}
    monkeypatch.setenv("LOADSTONE_TARGET_QPS", "4")
    monkeypatch.setenv("LOADSTONE_RESOLUTION", "0.3")
    arguments = given_to("rate", "--resolution", "0.4", file=file)
    assert [arguments[name] for name in ("levels", "target_qps", "resolution")] == ["1,2", 4.0, 0.4]


def test_loadstones_own_key_beats_the_one_of_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert given_to("find", file={"api-key": "filed"})["api_key"] == "theirs"
    monkeypatch.setenv("LOADSTONE_API_KEY", "ours")
    assert given_to("find", file={})["api_key"] == "ours"


def test_the_file_in_the_folder_is_used_and_beats_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loadstone.toml").write_text("[bench]\nnum-prompts = 9\n")
    assert main(["find", "--preset", "quick", "--show"]) == 0
    assert "--num-prompts" not in capsys.readouterr().out
    Path("other.toml").write_text("num-promts = 9\n")
    assert main(["bench", "--config", "other.toml"]) == 2
    expected = "loadstone: other.toml: no command knows the key num-promts; did you mean num-prompts?\n"
    assert capsys.readouterr().err == expected
    Path("other.toml").write_text("quiet = 3\n")
    assert main(["report", "run", "--config=other.toml"]) == 2
    assert "run is not a folder" in capsys.readouterr().err
