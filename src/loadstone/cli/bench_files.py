"""Where ``bench`` writes its result, and that it can."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadstone import __version__
from loadstone.cli.bench_settings import BenchSettings
from loadstone.cli.bench_setup import Setup
from loadstone.core.errors import UsageError
from loadstone.core.settings import DataSettings, LadderSettings, ServerSettings
from loadstone.measure.find import FindSettings
from loadstone.measure.runs import create_run
from loadstone.measure.steady import LevelData
from loadstone.measure.vllm_result import ResultSettings


def result_file(settings: BenchSettings, result: ResultSettings) -> Path | None:
    """The file to write, None where none is asked for; the name is vLLM's where none is given."""
    if not (settings.save_result or settings.append_result or settings.result_filename):
        return None
    return Path(settings.result_dir or "") / (settings.result_filename or _default_name(settings, result))


def _default_name(settings: BenchSettings, result: ResultSettings) -> str:
    rate = f"{settings.request_rate}qps"
    if settings.ramp_up_strategy is not None:
        rate = f"ramp-up-{settings.ramp_up_strategy}-{settings.ramp_up_start_rps}qps-{settings.ramp_up_end_rps}qps"
    slots = "" if settings.max_concurrency is None else f"-concurrency{settings.max_concurrency}"
    model = result.model_id.rstrip("/").split("/")[-1] or "model"
    return f"{settings.label or settings.backend}-{rate}{slots}-{model}-{result.date}.json"


def prepare_folder(file: Path) -> None:
    """Make the folder of ``file``; raises UsageError where the file could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(21, "is a folder")
        new = not file.exists()
        file.open("a").close()
        if new:
            file.unlink()
    except OSError as error:
        raise UsageError(f"--result-filename {file} cannot be written: {error.strerror}") from error


def save(file: Path, result: Mapping[str, Any], append: bool) -> None:
    """Write one JSON document, behind those that are there with ``append``; raises UsageError where that fails."""
    text = json.dumps(result)
    try:
        if append and file.exists() and file.stat().st_size:
            with file.open("a", encoding="utf-8") as out:
                out.write("\n" + text)
        else:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}; --json prints the result instead") from error


def write_run(
    settings: BenchSettings, setup: Setup, level: LevelData, result: Mapping[str, Any], now: datetime, command: str
) -> None:
    """The level as a run folder (``--out``) that ``judge`` reads; raises LoadstoneError where it cannot be written."""
    folder = create_run(settings.out, setup.result.model_id, now)
    workload = setup.workload
    known = FindSettings(
        server=ServerSettings(base_url=setup.base_url, endpoint=setup.endpoint.name, model=setup.result.model_id),
        data=DataSettings(
            dataset_name=workload.dataset_name,
            dataset_path=workload.dataset_path or "",
            random_input_len=workload.input_len,
            random_output_len=workload.output_len,
            seed=workload.seed,
        ),
        ladder=LadderSettings(levels=str(level.meta.concurrency)),
    )
    folder.write_run(
        {
            "schema": 1,
            "command": command,
            "created_at": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "loadstone": __version__,
            "settings": asdict(known),
            "server": {
                "base_url": setup.base_url,
                "model": setup.result.model_id,
                "endpoint": setup.endpoint.name,
                "streams": level.meta.streams,
                "through_gate": False,
            },
        }
    )
    folder.write_level(level, [], result)
