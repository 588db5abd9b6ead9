"""What this machine has to put engines on."""

import importlib.util
import os
from pathlib import Path

from loadstone.core.errors import UsageError
from loadstone.serve.cores import available_cores
from loadstone.serve.planning import Machine
from loadstone.wire.accelerators import Accelerators

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def look_at_machine(vllm_python: str) -> Machine:
    """The cores and GPUs that this process may use; ``vllm_python``: an interpreter that has vLLM, empty for none.

    Raises UsageError where that interpreter is none.
    """
    if vllm_python and not os.access(vllm_python, os.X_OK):
        raise UsageError(f"--vllm-python {vllm_python} is no interpreter that can be run")
    accelerators = Accelerators()
    return Machine(
        cores=tuple(sorted(available_cores())),
        gpus=_visible(len(accelerators)),
        gpu_memory_bytes=accelerators.least_memory_bytes(),
        vllm=bool(vllm_python) or importlib.util.find_spec("vllm") is not None,
    )


def _visible(count: int) -> tuple[str, ...]:
    """CUDA_VISIBLE_DEVICES where it is set: engines see no others."""
    told = os.environ.get(_VISIBLE)
    if told is None or count == 0:
        return tuple(map(str, range(count)))
    return tuple(device.strip() for device in told.split(",") if device.strip() not in ("", "-1"))


def is_gguf(model: str) -> bool:
    """A file in llama.cpp's format."""
    return model.lower().endswith(".gguf") and Path(model).is_file()


def check_model(model: str) -> None:
    """Raises UsageError for what looks like a path and is none; anything else may be a name on a hub."""
    path = Path(model)
    if not path.exists() and (model.startswith((".", "/", "~")) or model.lower().endswith(".gguf")):
        raise UsageError(f"--model {model}: no such file or folder")
