"""Real vLLM on the CPU behind the conformance suite of the chat engines, and once with an INT8 checkpoint.

The file is not named ``test_…``, so that ``make test`` leaves it alone.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from check_engine import CHECKS, Engine, ask, check_a_stream_says_what_a_document_says, text_of
from loadstone.core.settings import ServeSettings
from loadstone.serve.child import running_child
from loadstone.serve.engines.vllm import chat_command, check_int8
from processes import engine_figure

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-vllm" / "bin" / "python"
ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE=1", "HF_HUB_OFFLINE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind")
SLOTS, CONTEXT_TOKENS = 3, 2048


@contextmanager
def serving(folder: Path, maker: str, settings: ServeSettings) -> Iterator[Engine]:
    """vLLM on the checkpoint that ``maker`` writes, started as ``serve chat`` starts it."""
    model = str(folder / "model")
    subprocess.run([PYTHON, HERE / maker, model], check=True)
    if settings.quantization == "int8":
        check_int8(model, json.loads(Path(model, "config.json").read_text()))

    def command(port: int) -> list[str]:
        foreign = chat_command(str(PYTHON), model, port, settings, on_cpu=True)
        return ["env", *ENVIRONMENT, sys.executable, "-m", "loadstone.serve.guard", "--", *foreign]

    with running_child("vLLM", command, folder / "log", ready_timeout_s=300.0, stop_timeout_s=30.0) as base_url:
        yield Engine(
            *(base_url, model, SLOTS, CONTEXT_TOKENS),
            running=lambda: engine_figure(base_url, "vllm:num_requests_running", "vllm:num_requests_waiting"),
            generated=lambda: engine_figure(base_url, "vllm:generation_tokens_total"),
            over_long=("param", "input_tokens"),
            refuses_over_long_reply=True,
            lenient=frozenset({"stream is a text"}),
            unnamed=frozenset({"messages is empty"}),
        )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings = ServeSettings(max_num_seqs=SLOTS, max_model_len=CONTEXT_TOKENS)
    with serving(tmp_path_factory.mktemp("vllm"), "make_model.py", settings) as engine:
        yield engine


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: Callable[[Engine], None], engine: Engine) -> None:
    check(engine)


def test_an_int8_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    settings = ServeSettings(max_num_seqs=SLOTS, max_model_len=CONTEXT_TOKENS, quantization="int8")
    with serving(tmp_path, "make_int8_model.py", settings) as engine:
        assert len(text_of(ask(engine))) == 24
        check_a_stream_says_what_a_document_says(engine)
    assert "compressed-tensors" in (tmp_path / "log").read_text()
