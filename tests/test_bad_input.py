"""What a user can get wrong: one clear line that names the flag and says what to do, before anything is measured."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadstone.cli.main import main
from servers import BadServer, serving


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("used").mkdir()
    Path("used/notes.txt").touch()
    Path("file").touch()
    Path("empty.jsonl").write_text("\n")
    Path("cut.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    Path("other.jsonl").write_text('{"text": "a"}\n')
    Path("binary.jsonl").write_bytes(b"\xff\xfe")
    Path("tokenizer.json").write_text("{}")
    Path("bad.toml").write_text("levels = [\n")
    Path("noruns").mkdir()
    Path("torn").mkdir()
    Path("torn/run.toml").write_text("settings = [\n")
    Path("older").mkdir()
    Path("older/run.toml").write_text("schema = 1\n")


FIND = [
    (["--levels", ""], "--levels is empty: give at least one concurrency"),
    (["--levels", "5,2,1"], "--levels 5,2,1: must ascend without repeats; did you mean 1,2,5?"),
    (["--levels", "0,1"], "--levels 0,1: a concurrency is at least 1, not 0"),
    (["--levels", "1,1"], "did you mean 1?"),
    (["--levels", "1,two"], "give whole numbers separated by commas"),
    (["--out", "used"], "--out used is not empty; name another folder, or go on with it by --resume used"),
    (["--out", "file"], "is a file; name a folder that is empty or does not exist"),
    (["--out", "file/below"], "is a file; name a folder that is empty or does not exist"),
    (["--out", "x" * 300], "cannot be used: File name too long; name another folder"),
    (["--slo", "tpot"], "for example tpot:p99:50"),
    (["--slo", "tpot:p99:-1"], "for example tpot:p99:50"),
    (["--slo", "speed:p99:50"], "give ttft|tpot|itl|e2el:mean"),
    (["--base-url", "garbage"], "--base-url 'garbage': no http:// or https://"),
    (["--base-url", "ftp://host"], "the scheme is 'ftp', not http or https"),
    (["--base-url", "http://host:99999"], "Port out of range"),
    (["--base-url", "http://me:secret@host"], "user and password belong in --api-key or --header"),
    (["--header", "garbage"], "--header 'garbage': give NAME=VALUE"),
    (["--header", "A B=c"], "name and value must be printable ASCII"),
    (["--header", "Host=other"], "this header is set by loadstone itself"),
    (["--extra-body", "{"], "--extra-body is not a JSON object"),
    (["--extra-body", "[1]"], "--extra-body is not a JSON object"),
    (["--endpoint", "images"], "--endpoint images: choose chat, completions, embeddings, rerank"),
    (["--tokenizer", "nowhere"], "--tokenizer nowhere: no such file"),
    (["--tokenizer", "tokenizer.json"], "--tokenizer tokenizer.json cannot be loaded"),
    (["--dataset-name", "custom"], "--dataset-name custom needs --dataset-path FILE"),
    (["--dataset-name", "custom", "--dataset-path", "none.jsonl"], "none.jsonl cannot be read: No such file"),
    (["--dataset-name", "custom", "--dataset-path", "used"], "used cannot be read: Is a directory"),
    (["--dataset-name", "custom", "--dataset-path", "empty.jsonl"], "empty.jsonl is empty"),
    (["--dataset-name", "custom", "--dataset-path", "cut.jsonl"], "cut.jsonl, line 2: "),
    (["--dataset-name", "custom", "--dataset-path", "other.jsonl"], 'other.jsonl, line 1: chat needs {"prompt": …}'),
    (["--dataset-name", "custom", "--dataset-path", "binary.jsonl"], "binary.jsonl, line 1: "),
    (["--dataset-name", "sharegpt"], "choose random or custom"),
    (["--random-input-len", "0"], "--random-input-len 0 must be at least 1"),
    (["--random-range-ratio", "1.5"], "--random-range-ratio 1.5"),
    (["--request-timeout-s", "0"], "--request-timeout-s 0 must be between"),
    (["--request-timeout-s", "nan"], "--request-timeout-s nan must be between"),
    (["--request-timeout-s", "inf"], "--request-timeout-s inf must be between"),
    (["--max-level-seconds", "-1"], "--max-level-seconds -1 must be between"),
    (["--max-ttft-ms", "-1"], "--max-ttft-ms -1 must be between"),
    (["--min-success", "95"], "--min-success 95 must be between 0 and 1"),
    (["--ttft-stat", "p42"], "choose mean, p50, p95 or p99"),
    (["--nonsense"], "--nonsense"),
    (["--seed", "x"], "--seed"),
    (["--config"], "--config needs a file"),
    (["--config", "none.toml"], "configuration file none.toml cannot be read: No such file"),
    (["--config", "bad.toml"], "configuration file bad.toml cannot be read: "),
    (["--resume", "nowhere"], "nowhere is not a run folder: it has no run.toml"),
    (["--resume", "noruns"], "noruns is not a run folder: it has no run.toml"),
    (["--resume", "torn"], "torn/run.toml cannot be read: "),
    (["--resume", "older"], "older: the settings cannot be read"),
]


def _name(value: object) -> str:
    return " ".join(value)[:40] if isinstance(value, list) else ""


@pytest.mark.parametrize(("flags", "says"), FIND, ids=_name)
def test_find(server: BadServer, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(server.asked)
    where = [] if "--base-url" in flags else ["--base-url", server.url]
    assert main(["find", *where, *flags]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert err.startswith("loadstone: ")
    assert (out, err.count("\n"), len(server.asked) - before) == ("", 1, 0)
    assert not Path("runs").exists()


BENCH = [
    (["--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
    (["--max-concurrency", "0"], "--max-concurrency 0 must be at least 1"),
    (["--request-timeout-s", "inf"], "--request-timeout-s inf must be between"),
    (["--extra-body", "{"], "--extra-body is not JSON"),
    (["--header", "garbage"], "--header garbage: expected KEY=VALUE"),
    (["--backend", "unheard"], "--backend unheard is unknown"),
    (["--tokenizer", "nowhere"], "--tokenizer nowhere: no such file"),
    (["--dataset-name", "custom", "--dataset-path", "empty.jsonl"], "empty.jsonl is empty"),
    (["--result-filename", "file/below.json"], "--result-filename file/below.json cannot be written"),
    (["--result-filename", "used"], "--result-filename used cannot be written"),
    (["--goodput", "speed:1"], "--goodput"),
]


@pytest.mark.parametrize(("flags", "says"), BENCH, ids=_name)
def test_bench(server: BadServer, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(server.asked)
    assert main(["bench", "--base-url", server.url, *flags]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert (out, err.count("\n"), len(server.asked) - before) == ("", 1, 0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "9"], "check --host and --port, or --base-url"),
        (["--port", "9", "--model", "m"], "(--host and --port, or --base-url)"),
        (["--base-url", "http://127.0.0.1:9"], "check --base-url (host"),
    ],
)
def test_a_server_that_is_not_there(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 3
    assert says in capsys.readouterr().err


def test_a_full_disk_costs_a_bench_only_its_file(server: BadServer, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ("--input-len", "8", "--output-len", "4", "--num-prompts", "4", "--max-concurrency", "1")
    backend = ("--backend", "openai-chat")
    url = ("--base-url", server.url)
    assert main(["bench", *url, *backend, *lengths, "--json", "--result-filename", "/dev/full"]) == 2
    out, err = capsys.readouterr()
    assert "/dev/full cannot be written: No space left on device; --json prints the result instead" in err
    assert json.loads(out.splitlines()[-1])["completed"] == 4
