"""A tiny Qwen3-shaped model with random weights, made on the spot: it measures like a model, it does not talk like one.

The vocabulary is one token per printable ASCII character, so each sampled token is visible text and a prompt of n
characters is n tokens (byte tokens would be held back as broken UTF-8 and some replies would have no content at all).
"""

import dataclasses
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loadstone.core.errors import UsageError

if TYPE_CHECKING:
    import gguf

FORMAT_VERSION = 1
"""Raise it whenever the same shape would give another file: it is part of the cache's key."""

_CHARACTERS = [chr(code) for code in range(33, 127)]
_SPACE, _NEWLINE = "\u0120", "\u010a"
"""Blank and line feed as GPT-2's byte-level vocabulary writes them."""
_START, _END = "<|im_start|>", "<|im_end|>"
_TOKENS = [*_CHARACTERS, _SPACE, _NEWLINE, _START, _END]
_CONTROLS = [_TOKENS.index(_START), _TOKENS.index(_END)]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_Tensors = dict[str, NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class TinyShape:
    """The shape of the model. Weights are float32 on disk, so a file takes 4 bytes for each parameter."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 16
    ffn_width: int = 192
    context_tokens: int = 65_536
    seed: int = 0

    def parameters(self) -> int:
        """Number of weights, norms left out."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn_width) + 2 * self.width * len(_TOKENS)


def cached_model(shape: TinyShape, cache: Path | None = None) -> Path:
    """Path of the GGUF file of ``shape``, written on first use.

    ``cache`` is by default ``$XDG_CACHE_HOME/loadstone`` or ``~/.cache/loadstone``. The file appears by a rename, so
    a file that exists is whole, also when two processes make it at once. Raises UsageError where the ``gguf`` package
    is missing or the folder cannot be written.
    """
    folder = cache or _user_cache()
    path = folder / f"tiny-qwen3-{_key(shape)}.gguf"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=folder, suffix=".part")
        os.close(handle)
        try:
            write_model(shape, Path(unfinished))
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write the model to the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder "
            "that can be written"
        ) from error
    return path


def write_model(shape: TinyShape, path: Path) -> None:
    """Write the GGUF file of ``shape`` to ``path``: the same shape gives the same bytes."""
    try:
        package = importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise UsageError("the embedded engine needs gguf: pip install 'loadstone[llamacpp]'") from error
    writer: gguf.GGUFWriter = package.GGUFWriter(path, "qwen3")
    _describe(writer, shape)
    _add_vocabulary(writer, package)
    for name, tensor in _tensors(shape).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loadstone"


def _key(shape: TinyShape) -> str:
    return hashlib.sha256(f"{FORMAT_VERSION} {shape}".encode()).hexdigest()[:12]


def _describe(writer: "gguf.GGUFWriter", shape: TinyShape) -> None:
    writer.add_name("loadstone-tiny-random")
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)


def _add_vocabulary(writer: "gguf.GGUFWriter", package: object) -> None:
    types = package.TokenType  # type: ignore[attr-defined]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([types.CONTROL if i in _CONTROLS else types.NORMAL for i in range(len(_TOKENS))])
    writer.add_token_merges([f"{_START} {_END}"])  # llama.cpp wants a list that is not empty; this pair never meets
    writer.add_eos_token_id(_TOKENS.index(_END))
    writer.add_add_bos_token(False)
    writer.add_chat_template(_CHAT_TEMPLATE)


def _tensors(shape: TinyShape) -> _Tensors:
    draw = np.random.default_rng(shape.seed)

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return draw.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    def ones(size: int) -> NDArray[np.float32]:
        return np.ones(size, dtype=np.float32)

    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    tensors: _Tensors = {
        "token_embd.weight": matrix(len(_TOKENS), shape.width),
        "output_norm.weight": ones(shape.width),
        "output.weight": matrix(len(_TOKENS), shape.width),
    }
    for layer in range(shape.layers):
        block: _Tensors = {
            "attn_norm": ones(shape.width),
            "attn_q": matrix(queries, shape.width),
            "attn_k": matrix(keys, shape.width),
            "attn_v": matrix(keys, shape.width),
            "attn_q_norm": ones(shape.head_width),
            "attn_k_norm": ones(shape.head_width),
            "attn_output": matrix(shape.width, queries),
            "ffn_norm": ones(shape.width),
            "ffn_gate": matrix(shape.ffn_width, shape.width),
            "ffn_up": matrix(shape.ffn_width, shape.width),
            "ffn_down": matrix(shape.width, shape.ffn_width),
        }
        tensors |= {f"blk.{layer}.{name}.weight": tensor for name, tensor in block.items()}
    _silence_controls(tensors)
    return tensors


def _silence_controls(tensors: _Tensors) -> None:
    """Keep the first channel of the residual stream constant and let it forbid the control tokens.

    They render as nothing, and one of them ends the reply: without this a random model stops at random.
    """
    for name, tensor in tensors.items():
        if name.endswith(("attn_output.weight", "ffn_down.weight")):
            tensor[0, :] = 0.0
    tensors["token_embd.weight"][:, 0] = 1.0
    tensors["output.weight"][:, 0] = 0.0
    tensors["output.weight"][_CONTROLS, :] = 0.0
    tensors["output.weight"][_CONTROLS, 0] = -1_000.0
