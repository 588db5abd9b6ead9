"""The run folder: what is written is read back, and only what was written whole stands."""

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tomli_w

from loadstone.core.errors import LoadstoneError, UsageError
from loadstone.core.limits import Evidence, Limits, LimitsFile
from loadstone.core.records import Outcome, RequestRecord
from loadstone.core.settings import DataSettings, LadderSettings, RuleSettings, ServerSettings
from loadstone.core.verdict import LevelKind, RunVerdict
from loadstone.measure.book import RunBook
from loadstone.measure.find import FindSettings, settings_of
from loadstone.measure.machine import MachineReading
from loadstone.measure.rules import Rules
from loadstone.measure.runs import RunFolder, check_out, create_run, open_run, slug
from loadstone.measure.search import SearchSettings
from loadstone.measure.steady import LevelData
from loadstone.measure.telemetry import TelemetrySample, summarise_telemetry
from made_levels import level, meta, replace_meta

NOW = datetime(2026, 11, 20, 10, 0, 0, tzinfo=UTC)
SAMPLES = [TelemetrySample(t / 2, None, MachineReading(client_cpu_s=0.1 * t, host_memory_free=0.5)) for t in range(30)]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = create_run(str(tmp_path / "run"), "tiny", NOW)
    made.write_run({"schema": 1})
    return made


def write(folder: RunFolder, data: LevelData, ordinal: int = 1) -> LevelData:
    numbered = replace_meta(data, ordinal=ordinal)
    folder.write_level(numbered, SAMPLES, {"completed": len(data.records)})
    return numbered


def file_of(folder: RunFolder, name: str, level: str = "001-c4") -> Path:
    return folder.path / "levels" / level / name


# -- round trips ----------------------------------------------------------------------------------------------------


def test_a_level_is_read_back_as_it_was_written(folder: RunFolder) -> None:
    everything = RequestRecord(
        3, 2, 0.5, 0.6, 1.7, Outcome.REFUSED, status=503, error="zu viel / 服务繁忙", ttft_s=0.1, first_choice_s=0.09,
        last_choice_s=1.0, itls_s=[0.01, 0.02], chunks=3, input_tokens=512, output_tokens=3, sequences=2,
        turnaround_s=1e-5, lag_s=2e-6, retry_after_s=7.0, reason="queue_full", text="a\nb",
    )  # fmt: skip
    plain = level(4, kind=LevelKind.CONFIRM, kernel_stamps=True, clock_step_ms=0.2, output_tokens_from="chunks")
    written = write(folder, LevelData(plain.meta, [*plain.records, everything], plain.server))
    (read,) = open_run(str(folder.path)).levels()
    assert read.meta == written.meta
    assert list(read.records) == list(written.records)
    window = read.meta.window_start_s, read.meta.window_end_s
    assert read.server == summarise_telemetry(SAMPLES, *window)


def test_the_layout_is_the_contracts(folder: RunFolder) -> None:
    write(folder, level(4), ordinal=1)
    write(folder, level(200), ordinal=12)
    assert sorted(p.name for p in (folder.path / "levels").iterdir()) == ["001-c4", "012-c200"]
    assert sorted(p.name for p in (folder.path / "levels/012-c200").iterdir()) == [
        "records.jsonl.zst", "result.json", "telemetry.jsonl.zst",
    ]  # fmt: skip
    result = msgspec.json.decode(file_of(folder, "result.json").read_bytes())
    assert result["completed"] == 48
    assert result["loadstone"]["concurrency"] == 4


def test_levels_come_in_running_order(folder: RunFolder) -> None:
    for ordinal, concurrency in ((1, 1), (2, 500), (3, 20), (10, 2), (11, 3)):
        write(folder, level(concurrency, waves=4), ordinal)
    assert [(x.meta.ordinal, x.meta.concurrency) for x in folder.levels()] == [
        (1, 1),
        (2, 500),
        (3, 20),
        (10, 2),
        (11, 3),
    ]


def test_what_follows_from_the_levels_is_the_same_after_reading(folder: RunFolder) -> None:
    settings = SearchSettings(Rules(min_gain=0.0), (1, 2, 5))
    levels = [write(folder, level(n, waves=70), ordinal) for ordinal, n in enumerate((1, 2, 5, 4), 1)]
    before = RunBook(settings, [replace_server(data) for data in levels])
    after = RunBook(settings, folder.levels())
    assert after.verdict() == before.verdict()
    assert after.ask() == before.ask()


def replace_server(data: LevelData) -> LevelData:
    window = data.meta.window_start_s, data.meta.window_end_s
    return LevelData(data.meta, data.records, summarise_telemetry(SAMPLES, *window))


def test_the_settings_of_a_run_are_read_back(folder: RunFolder) -> None:
    settings = FindSettings(
        ServerSettings(base_url="https://example.org/v1", header=("X-A=b", "X-C=d"), extra_body='{"top_k": 1}'),
        DataSettings(random_range_ratio=0.25, seed=7),
        RuleSettings(slo=("tpot:p99:50", "ttft:p95:800"), max_ttft_ms=250.5, min_gain=0.0),
        LadderSettings(levels="1,3,9", max_level_seconds=20.0),
    )
    folder.write_run({"schema": 1, "settings": msgspec.to_builtins(settings)})
    assert settings_of(folder.read_run(), "run") == settings


def test_settings_that_an_older_run_lacks_take_their_defaults() -> None:
    assert settings_of({"settings": {"rules": {"min_success": 0.9}}}, "run") == FindSettings(
        rules=RuleSettings(min_success=0.9)
    )


@pytest.mark.parametrize("document", [{}, {"settings": 3}, {"settings": {"rules": {"min_success": "high"}}}])
def test_settings_that_cannot_be_read_name_the_run(document: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^runs/one: the settings cannot be read"):
        settings_of(document, "runs/one")


# -- what stands ----------------------------------------------------------------------------------------------------


def test_the_result_is_written_last_and_by_rename(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[str]]] = []
    rename = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((Path(target).name, sorted(p.name for p in self.parent.iterdir())))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write(folder, level(4))
    assert seen == [("result.json", ["records.jsonl.zst", "result.json.part", "telemetry.jsonl.zst"])]
    assert not list(folder.path.rglob("*.part"))


@pytest.mark.parametrize("left", [["records.jsonl.zst"], ["records.jsonl.zst", "telemetry.jsonl.zst"], []])
def test_a_level_without_its_result_does_not_stand(folder: RunFolder, left: list[str]) -> None:
    write(folder, level(1), 1)
    write(folder, level(4), 2)
    for file in file_of(folder, "", "002-c4").iterdir():
        if file.name not in left:
            file.unlink()
    file_of(folder, "result.json.part", "002-c4").write_bytes(b'{"completed"')
    assert [x.meta.concurrency for x in folder.levels()] == [1]
    write(folder, level(4), 2)
    assert [x.meta.concurrency for x in folder.levels()] == [1, 4], "and it is written again in its place"


def test_a_run_without_levels_has_none(folder: RunFolder) -> None:
    assert folder.levels() == []
    shutil.rmtree(folder.path / "levels")
    assert folder.levels() == []


def test_a_full_disk_is_told_with_what_to_do(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, level(1), 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LoadstoneError, match=r"002-c4/records.*No space left.*free some space and go on with --resume"):
        write(folder, level(4), 2)
    monkeypatch.undo()
    assert [x.meta.concurrency for x in folder.levels()] == [1]


# -- what is damaged ------------------------------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


@pytest.mark.parametrize("name", ["records.jsonl.zst", "telemetry.jsonl.zst"])
@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: data[:-1], lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}\n"],
)
def test_a_damaged_file_is_named(folder: RunFolder, name: str, damage: Any) -> None:
    write(folder, level(1), 1)
    write(folder, level(4), 2)
    path = file_of(folder, name, "002-c4")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        UsageError, match=r"002-c4/.* cannot be read: .*delete its folder to run that level again"
    ) as told:
        folder.levels()
    assert str(path) in str(told.value)
    shutil.rmtree(path.parent)
    assert [x.meta.concurrency for x in folder.levels()] == [1]


@pytest.mark.parametrize("name", ["records.jsonl.zst", "telemetry.jsonl.zst"])
def test_a_missing_file_is_named(folder: RunFolder, name: str) -> None:
    write(folder, level(4))
    file_of(folder, name).unlink()
    with pytest.raises(UsageError, match=f"001-c4/{name} cannot be read: .*No such file"):
        folder.levels()


@pytest.mark.parametrize("text", [b"", b'{"loadstone": ', b"\xff\xfe", b'{"loadstone": {"ordinal": "one"}}', b'"\xff"'])
def test_a_damaged_result_is_named(folder: RunFolder, text: bytes) -> None:
    write(folder, level(4))
    file_of(folder, "result.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"001-c4/result.json cannot be read"):
        folder.levels()


def test_a_result_of_another_tool_is_named(folder: RunFolder) -> None:
    write(folder, level(4))
    file_of(folder, "result.json").write_bytes(b'{"completed": 3}')
    with pytest.raises(UsageError, match="was not written by loadstone"):
        folder.levels()


@pytest.mark.parametrize("text", [b"settings = [", b"\xff\xfe"])
def test_a_damaged_run_file_is_named(folder: RunFolder, text: bytes) -> None:
    (folder.path / "run.toml").write_bytes(text)
    with pytest.raises(UsageError, match=r"run.toml cannot be read"):
        folder.read_run()


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder: it has no run.toml"):
        open_run(str(tmp_path))


# -- where a run may go ---------------------------------------------------------------------------------------------


def test_a_folder_that_is_absent_or_empty_is_used_exactly(tmp_path: Path) -> None:
    assert create_run(str(tmp_path / "a/b"), "x", NOW).path == tmp_path / "a/b"
    (tmp_path / "empty").mkdir()
    assert create_run(str(tmp_path / "empty"), "x", NOW).path == tmp_path / "empty"


def test_without_a_name_it_goes_by_time_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run("", "Qwen/Qwen3-8B", NOW).path == Path("runs/20261120-100000-qwen3-8b")
    with pytest.raises(UsageError, match="name another folder"):
        create_run("", "Qwen/Qwen3-8B", NOW)


def test_a_folder_in_use_is_left_alone(folder: RunFolder) -> None:
    with pytest.raises(UsageError, match=r"is not empty; name another folder, or go on with it by --resume"):
        check_out(str(folder.path))


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UsageError, match=r"name .*folder"):
            check_out(str(out))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UsageError, match=r"cannot be written: no permission in .*; name another folder"):
        check_out(str(tmp_path / "new"))


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UsageError, match="cannot be written: Read-only file system; name another folder"):
        create_run(str(tmp_path / "new"), "x", NOW)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("gpt-4o", "gpt-4o"),
        ("/models/my model/", "my-model"),
        ("../..", "run"),
        ("模型", "run"),
        ("", "run"),
        (".hidden", "hidden"),
    ],
)
def test_a_models_name_in_a_folders(model: str, name: str) -> None:
    assert slug(model) == name


# -- verdict and limits ---------------------------------------------------------------------------------------------


def test_limits_of_an_earlier_verdict_do_not_stay(folder: RunFolder) -> None:
    evidence = Evidence(
        measured_max_concurrency=4, headroom=0.75, binding="ttft", claim="4 held", measured_at="2026-11-20T10:00:00Z",
        expires_at="2026-12-20T10:00:00Z", model="m", endpoint="chat", base_url="http://x",
    )  # fmt: skip
    folder.write_limits(LimitsFile(limits=Limits(max_concurrency=3), evidence=evidence))
    assert (folder.path / "limits.toml").is_file()
    folder.write_limits(None)
    folder.write_limits(None)
    assert not (folder.path / "limits.toml").exists()


def test_the_verdict_is_plain_json(folder: RunFolder) -> None:
    verdict = RunBook(SearchSettings(Rules(), (4,)), [level(4, failed=[Outcome.TIMEOUT] * 9)]).verdict()
    folder.write_verdict(verdict)
    text = (folder.path / "verdict.json").read_bytes()
    assert msgspec.json.decode(text, type=RunVerdict) == verdict
    names = "measured_max_concurrency recommended_concurrency half_of_failing binding best_efficiency gain_line"
    assert {*names.split(), "non_monotone", "claim", "peak_throughput_rps", "levels"} <= msgspec.json.decode(
        text
    ).keys()


def test_the_run_file_survives_toml(folder: RunFolder) -> None:
    document = {"schema": 1, "command": 'find --slo "a b"', "server": {"first_e2el_s": 0.1, "streams": True}}
    folder.write_run(document)
    assert folder.read_run() == document
    assert (folder.path / "run.toml").read_text() == tomli_w.dumps(document)


def test_an_empty_level_is_written_and_read(folder: RunFolder) -> None:
    write(folder, LevelData(meta(4, (1.0, 1.0)), [], level(4).server))
    assert [list(x.records) for x in folder.levels()] == [[]]
