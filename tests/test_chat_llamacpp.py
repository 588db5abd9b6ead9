"""llama.cpp behind the conformance suite of the chat engines."""

from collections.abc import Callable, Iterator

import pytest

from check_engine import CHECKS, Engine
from loadstone.serve.child import running_child
from loadstone.serve.cores import available_cores
from loadstone.serve.engines.llamacpp import Slots, command
from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model
from processes import engine_figure

# One core: threads that wait for each other in a loop come to a standstill where others compute as well.
CORES = frozenset([max(available_cores())])
SLOTS = Slots(parallel=3, context_tokens=4096, cores=CORES, alias="tiny", reuse_prompts=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("llamacpp")
    model_path = cached_model(TinyShape(), folder)
    with running_child("llama.cpp", lambda port: command(model_path, port, SLOTS), folder / "log") as base_url:
        yield Engine(
            base_url,
            SLOTS.alias,
            SLOTS.parallel,
            SLOTS.context_tokens,
            running=lambda: engine_figure(base_url, "llamacpp:requests_processing", "llamacpp:requests_deferred"),
            generated=lambda: engine_figure(base_url, "llamacpp:tokens_predicted_total"),
            finishes_documents=True,
            checks_model=False,
            over_long=("type", "exceed_context_size_error"),
            usage_rides=True,
            loses_held_text=True,
            lenient=frozenset({"messages is empty", "temperature is negative", "top_p is above 1", "stop is a number"}),
        )


@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check: Callable[[Engine], None], engine: Engine) -> None:
    check(engine)
