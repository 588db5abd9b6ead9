"""The tiny random model: the same bytes each time, whole or not there, with a vocabulary that can be seen."""

import string
from pathlib import Path

import gguf
import numpy as np
import pytest

from loadstone.core.errors import UsageError
from loadstone.serve.engines.tiny_gguf import TinyShape, cached_model, write_model


def test_the_same_shape_gives_the_same_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    for name, shape in {"a": TinyShape(), "b": TinyShape(), "c": TinyShape(seed=1)}.items():
        write_model(shape, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_the_file_says_what_the_shape_says(tmp_path: Path) -> None:
    shape = TinyShape(layers=3, width=32, heads=2, kv_heads=1, head_width=16, ffn_width=48, context_tokens=256)
    write_model(shape, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "qwen3"
    assert said["qwen3.block_count"] == 3
    assert said["qwen3.embedding_length"] == 32
    assert said["qwen3.context_length"] == 256
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors if len(tensor.shape) == 2)
    assert weights == shape.parameters()


def test_every_token_is_a_printable_character_a_blank_a_line_feed_or_a_control(tmp_path: Path) -> None:
    write_model(TinyShape(), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    printable = {*string.ascii_letters, *string.digits, *string.punctuation}
    assert set(tokens) == {*printable, "\u0120", "\u010a", "<|im_start|>", "<|im_end|>"}
    assert len(tokens) == len(set(tokens))


def test_the_head_forbids_the_control_tokens_whatever_the_layers_do(tmp_path: Path) -> None:
    write_model(TinyShape(), tmp_path / "model.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (tensors["token_embd.weight"][:, 0] == 1.0).all()
    for name in ("blk.0.attn_output.weight", "blk.1.ffn_down.weight"):
        assert not tensors[name][0].any()
    assert tensors["output.weight"][-2:].sum() == -2_000.0


def test_a_model_is_made_once_and_nothing_unfinished_stays(tmp_path: Path) -> None:
    first = cached_model(TinyShape(), tmp_path)
    made = first.stat()
    assert cached_model(TinyShape(), tmp_path) == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert cached_model(TinyShape(seed=1), tmp_path) != first
    assert all(path.suffix == ".gguf" for path in tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "HOME"])
def test_it_lies_in_the_users_cache_folder(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = tmp_path if variable == "XDG_CACHE_HOME" else tmp_path / ".cache"
    assert cached_model(TinyShape()).parent == folder / "loadstone"


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cache folder .*file/inside.*XDG_CACHE_HOME"):
        cached_model(TinyShape(), tmp_path / "file" / "inside")
