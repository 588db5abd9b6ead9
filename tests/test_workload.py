"""Workloads: exact lengths, new text for each request, custom files without repeats."""

import base64
import json
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.api import ENDPOINTS
from loadstone.core.api.endpoint import BodyOptions
from loadstone.core.errors import UsageError
from loadstone.core.records import Outcome, RequestRecord
from loadstone.measure.pictures import PictureTexts
from loadstone.measure.texts import Sizing, WordTexts, pick_words, sizing_through
from loadstone.measure.tokens import (
    FittedTexts,
    Tokenizer,
    exact_sizing,
    fill_output_tokens,
    load_tokenizer,
    texts_for,
)
from loadstone.measure.vocabulary import WORDS
from loadstone.measure.workload import CustomWorkload, RandomWorkload, WorkloadSettings, load_rows

OPTIONS = BodyOptions(model="m")


def random_workload(name: str = "completions", **settings: Any) -> RandomWorkload:
    endpoint = ENDPOINTS[name]
    return RandomWorkload(WorkloadSettings(**settings), WordTexts(Sizing(), 0), endpoint, endpoint.path, OPTIONS)


def body_of(workload: RandomWorkload | CustomWorkload, level: int, index: int) -> dict[str, Any]:
    body: dict[str, Any] = msgspec.json.decode(workload.request(level, index).body)
    return body


def test_the_vocabulary() -> None:
    assert len(set(WORDS)) == len(WORDS) == 256
    assert {len(word) for word in WORDS} == {4}


def test_same_index_same_lengths_new_text_on_every_level() -> None:
    workload = random_workload(input_range_ratio=0.5, output_range_ratio=0.9)
    first, second = workload.request(0, 7), workload.request(1, 7)
    assert (first.input_tokens, first.output_tokens) == (second.input_tokens, second.output_tokens)
    assert first.body != second.body
    assert workload.request(0, 7) == first
    inputs = [workload.request(0, index).input_tokens or 0 for index in range(200)]
    assert 256 <= min(inputs) < 300 < 700 < max(inputs) <= 768


def test_prompts_share_no_prefix() -> None:
    workload = random_workload(input_len=40)
    prompts = [body_of(workload, level, index)["prompt"].split() for level in range(5) for index in range(100)]
    assert len({tuple(words[:3]) for words in prompts}) == 500
    assert max(Counter(words[0] for words in prompts).values()) <= 5
    assert len({body_of(workload, 0, index)["prompt"].split()[0] for index in range(100)}) == 100


def test_a_prefix_is_shared_where_it_is_asked_for() -> None:
    settings = WorkloadSettings(input_len=20, prefix_len=10)
    endpoint = ENDPOINTS["completions"]
    workload = RandomWorkload(settings, WordTexts(Sizing(), 0, 10), endpoint, "/x", OPTIONS)
    prompts = [body_of(workload, level, 3)["prompt"].split() for level in range(2)]
    assert prompts[0][:10] == prompts[1][:10]
    assert prompts[0][10] != prompts[1][10]
    assert {len(words) for words in prompts} == {30}


@pytest.mark.parametrize(
    ("name", "sequences", "tokens"), [("embeddings", 3, 300), ("rerank", 3, 396), ("chat", 1, 100), ("rerank", 8, 1056)]
)
def test_texts_in_a_request(name: str, sequences: int, tokens: int) -> None:
    batch = None if sequences in (1, 8) else sequences
    workload = random_workload(name, input_len=100, batch_size=batch)
    request = workload.request(0, 0)
    assert (request.sequences, request.input_tokens) == (sequences, tokens)
    body = msgspec.json.decode(request.body)
    if name == "rerank":
        assert len(body["query"].split()) == 32
        assert {len(document.split()) for document in body["documents"]} == {100}
        assert len(set(body["documents"])) == sequences
    assert request.output_tokens == (128 if name == "chat" else None)


def test_images_in_a_request() -> None:
    settings = WorkloadSettings(batch_size=2)
    workload = RandomWorkload(settings, PictureTexts(0), ENDPOINTS["embed_image"], "/embed_image", OPTIONS)
    requests = [workload.request(level, index) for level in range(2) for index in range(3)]
    assert {(request.sequences, request.input_tokens, request.output_tokens) for request in requests} == {
        (2, None, None)
    }
    images = [image for request in requests for image in msgspec.json.decode(request.body)["images"]]
    assert len(set(images)) == 12
    assert workload.request(1, 2) == requests[-1]


def test_a_picture_is_a_png() -> None:
    png = base64.b64decode(PictureTexts(3).text(0, 0, 0))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (256, 256)
    kinds, at, pixels = [], 8, b""
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + data),)
        kinds.append(kind)
        pixels += data if kind == b"IDAT" else b""
        at += length + 12
    assert kinds == [b"IHDR", b"IDAT", b"IEND"]
    assert len(zlib.decompress(pixels)) == 256 * (1 + 3 * 256)
    assert len(png) < 8_000


@given(st.integers(1, 3000), st.integers(0, 60), st.sampled_from([1, 5]))
def test_sizing_hits_every_length_it_can(tokens: int, overhead: int, per_word: int) -> None:
    sizing = Sizing(overhead, per_word)
    words, letters = sizing.words_for(tokens)
    if tokens >= overhead + per_word:
        assert sizing.tokens_of(words, letters) == tokens
    else:
        assert (words, letters) == (1, 0)


def test_a_line_through_two_lengths() -> None:
    assert sizing_through((8, 20), (40, 52)) == Sizing(12, 1)
    assert sizing_through((8, 51), (40, 211)) == Sizing(11, 5)
    assert sizing_through((8, 20), (40, 20)) == Sizing()


def test_short_texts_exist() -> None:
    assert [len(pick_words(0, 0, 0, count)) for count in (0, 1, 2, 3, 4)] == [0, 1, 2, 3, 4]


# -- tokenizers


def word_level() -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {"[CLS]": 0, "[UNK]": 1} | {word: 2 + i for i, word in enumerate(WORDS)}
    library = Library(models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    return library


def byte_level() -> Any:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def uneven() -> Any:
    """Some of our words are one token, others four letters, and ``e`` swallows the ``a`` after it."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    letters = sorted(set("".join(WORDS)) | set(" abcdefghijklmnopqrstuvwxyz"))
    merges = [(a, b) for a in "aei" for b in "lnrt"]
    tokens = letters + [a + b for a, b in merges]
    library = Library(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    library.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return library


@pytest.mark.parametrize("make", [word_level, byte_level])
@pytest.mark.parametrize("prefix", [0, 10])
def test_texts_have_exactly_the_tokens_asked_for(make: Any, prefix: int) -> None:
    tokenizer = Tokenizer(make())
    assert exact_sizing(tokenizer) is not None
    texts = texts_for(tokenizer, 0, prefix)
    for tokens in (10, 11, 12, 13, 14, 15, 100, 512):
        assert tokenizer.count(texts.text(1, tokens, tokens), special=True) == prefix + tokens


def test_an_uneven_tokenizer_is_fitted() -> None:
    tokenizer = Tokenizer(uneven())
    assert exact_sizing(tokenizer) is None
    texts = texts_for(tokenizer, 0, 5)
    assert isinstance(texts, FittedTexts)
    for tokens in (1, 2, 9, 10, 100, 333):
        for level in range(3):
            assert tokenizer.count(texts.text(level, 4, tokens)) == 5 + tokens


def test_a_tokenizer_is_loaded_from_a_file_or_a_folder(tmp_path: Path) -> None:
    word_level().save(str(tmp_path / "tokenizer.json"))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(place)).count("able word", special=True) == 3


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for place in (tmp_path, tmp_path / "bad.json", tmp_path / "absent"):
        with pytest.raises(UsageError, match="--tokenizer"):
            load_tokenizer(str(place))


def test_output_tokens_come_from_usage_tokenizer_or_chunks() -> None:
    def record(tokens: int | None) -> RequestRecord:
        return RequestRecord(
            index=0,
            slot=0,
            planned_s=0,
            sent_s=0,
            end_s=1,
            outcome=Outcome.OK,
            output_tokens=tokens,
            chunks=4,
            text="able word",
        )

    assert fill_output_tokens([record(3)], None) == ([record(3)], "usage")
    assert fill_output_tokens([record(3), record(None)], None) == ([record(3), record(4)], "chunks")
    assert fill_output_tokens([record(None)], Tokenizer(word_level())) == ([record(2)], "tokenizer")


# -- custom files


def custom(tmp_path: Path, lines: list[Any], name: str = "chat", **settings: Any) -> CustomWorkload:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    chosen = WorkloadSettings(dataset_name="custom", dataset_path=str(file), **settings)
    return CustomWorkload(chosen, load_rows(str(file), ENDPOINTS[name]), ENDPOINTS[name], "/x", OPTIONS)


def test_levels_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    workload = custom(tmp_path, [{"prompt": f"p{i}"} for i in range(10)], "completions", shuffle=False)
    prompts = [body_of(workload, level, index)["prompt"] for level, index in [(0, 0), (0, 1), (3, 0), (3, 1), (0, 0)]]
    assert prompts == ["p0", "p1", "p2", "p3", "p0"]
    assert not workload.notes
    assert body_of(workload, 4, 7)["prompt"] == "p1"
    assert "(10) were repeated for 12 requests" in workload.notes[0]


def test_shuffled_by_seed(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{i}"} for i in range(50)]
    orders = [
        [body_of(custom(tmp_path, lines, "completions", seed=seed), 0, i)["prompt"] for i in range(50)]
        for seed in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_output_lengths_of_custom(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "output_tokens": 7}, "", {"messages": [{"role": "user", "content": "b"}]}]
    assert [custom(tmp_path, lines, shuffle=False).request(0, i).output_tokens for i in (0, 1)] == [7, 256]
    assert custom(tmp_path, lines, custom_output_len=3).request(0, 0).output_tokens == 3
    assert custom(tmp_path, lines, shuffle=False, custom_output_len=-1).request(0, 0).output_tokens == 7


@pytest.mark.parametrize(
    ("lines", "name", "text"),
    [
        ([], "chat", "is empty"),
        (["{"], "chat", "line 1"),
        ([{"prompt": "a"}, {"x": 1}], "chat", "line 2: chat needs"),
        ([{"messages": [{}]}], "completions", "completions needs"),
        ([{"prompt": "a"}], "rerank", "documents"),
        ([{"prompt": 7}], "chat", "line 1"),
        ([{"prompt": "a"}], "embed_image", "line 1: embed_image needs"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[Any], name: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        custom(tmp_path, lines, name)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"dataset_name": "sharegpt"}, "random or custom"),
        ({"dataset_name": "custom"}, "--dataset-path"),
        ({"dataset_path": "x"}, "custom"),
        ({"input_len": 0}, "--random-input-len"),
        ({"batch_size": 0}, "--random-batch-size"),
        ({"input_range_ratio": 1.0}, "--random-range-ratio"),
    ],
)
def test_bad_settings_are_named(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        WorkloadSettings(**wrong)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_rows("/nowhere/at/all.jsonl", ENDPOINTS["chat"])
