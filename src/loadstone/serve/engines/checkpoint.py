"""A model's configuration and tokenizer, from a folder or from the hub, without the libraries that run it."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from loadstone.core.errors import UsageError


def read_config(model: str) -> dict[str, Any]:
    """``config.json`` of ``model``. Raises UsageError where there is none."""
    try:
        config = json.loads(_file(model, "config.json").read_text())
    except ValueError as error:
        raise UsageError(f"--model {model}: config.json is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UsageError(f"--model {model}: config.json is not a JSON object")
    return config


def read_tokenizer(model: str) -> Any:
    """A ``tokenizers.Tokenizer`` of ``model``. Raises UsageError where there is none."""
    if importlib.util.find_spec("tokenizers") is None:
        raise UsageError("this engine needs the tokenizers package: pip install 'loadstone[tokenizer]'")
    path = _file(model, "tokenizer.json")
    try:
        return importlib.import_module("tokenizers").Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise UsageError(f"--model {model}: tokenizer.json cannot be loaded ({error})") from error


def _file(model: str, name: str) -> Path:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise UsageError(f"--model {model}: the folder has no {name}; give the folder of a checkpoint")
        return folder / name
    if model.count("/") != 1 or model.startswith((".", "/")):
        raise UsageError(f"--model {model}: no such folder, and not a name on the hub such as Qwen/Qwen3-Reranker-0.6B")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"--model {model}: names on the hub need huggingface_hub; give the model's folder")
    try:
        return Path(importlib.import_module("huggingface_hub").hf_hub_download(model, name))
    except Exception as error:  # no network, no such model, no permission: each library layer has its own class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"--model {model}: {name} cannot be had from the hub ({reason[0]}); give the folder of a local copy"
        ) from error
