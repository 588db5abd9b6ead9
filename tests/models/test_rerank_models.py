"""Rerankers that really compute: tiny random ones, against their authors' own computation."""

import asyncio
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
)

from loadstone.core.engine import EngineError
from loadstone.core.errors import UsageError
from loadstone.core.refusals import BadAskError
from loadstone.serve.batching import Batching, BatchSettings
from loadstone.serve.child import running_child
from loadstone.serve.engines.checkpoint import read_tokenizer
from loadstone.serve.engines.cross_encoder import CrossEncoderReranker
from loadstone.serve.engines.qwen_prompt import QwenPrompt
from loadstone.serve.engines.qwen_reranker import QwenReranker
from loadstone.serve.pairs import Pair, Score
from processes import fetch
from tiny_reranker import INSTRUCTION, make_converted, make_reranker, official_scores

torch.set_num_threads(1)
DRAW = random.Random(0)
WORDS = ["capital", "China", "is", "Beijing", "answer", "query", "passage", "no", "北京", "the"]
TRIPLES = [
    (DRAW.choice([INSTRUCTION, "Find a city"]), f"what is {at}?", " ".join(DRAW.choices(WORDS, k=DRAW.randint(1, 60))))
    for at in range(24)
]


def pairs(triples: Sequence[tuple[str, str, str]] = TRIPLES, **more: object) -> list[Pair]:
    return [
        Pair(query, document, "query", f"documents[{at}]", instruction=task, **more)  # type: ignore[arg-type]
        for at, (task, query, document) in enumerate(triples)
    ]


def values(results: Sequence[object]) -> list[float]:
    return [result.value for result in results if isinstance(result, Score)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reranker")
    make_reranker(made / "original")
    make_converted(made / "original", made / "converted")
    return made


@pytest.fixture(scope="module")
def official(folder: Path) -> list[float]:
    return official_scores(folder / "original", TRIPLES)


def qwen(folder: Path, name: str = "original", limit: int = 1024) -> QwenReranker:
    model = str(folder / name)
    return QwenReranker(model, QwenPrompt(read_tokenizer(model), limit), original=name == "original")


@pytest.mark.parametrize("name", ["original", "converted"])
def test_scores_are_those_of_the_authors(name: str, folder: Path, official: list[float]) -> None:
    engine = qwen(folder, name)
    found = values(engine.run([engine.prepare(pair) for pair in pairs()]))
    assert found == pytest.approx(official, abs=1e-5)
    assert max(found) - min(found) > 0.1


def test_a_score_is_the_same_in_every_batch(folder: Path, official: list[float]) -> None:
    engine = qwen(folder)
    ready = [engine.prepare(pair) for pair in pairs()]
    for size in (1, 2, 7):
        batches = [ready[at : at + size] for at in range(0, len(ready), size)]
        assert [value for batch in batches for value in values(engine.run(batch))] == pytest.approx(official, abs=1e-5)
    assert values(engine.run(ready[::-1])) == pytest.approx(official[::-1], abs=1e-5)


def test_what_prompts_begin_with_is_computed_once(folder: Path) -> None:
    engine = qwen(folder)
    queries = [f"what is {at} as it is asked here and nowhere else?" for at in (1, 2)]
    asked = [(INSTRUCTION, query, f"{at} Beijing") for query in queries for at in range(8)]
    ready = [engine.prepare(pair) for pair in pairs(asked)]
    computed: list[int] = []
    engine._model.embed_tokens.register_forward_hook(lambda _, given, out: computed.append(out.shape[1]))
    engine.run(ready)
    assert not engine.pads
    assert sum(computed) < sum(len(pair.ids) for pair in ready) / 3


def test_a_model_that_sees_only_its_neighbourhood_is_padded(folder: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "original")
    config.update({"use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention"] * 3})
    AutoModelForCausalLM.from_pretrained(folder / "original", config=config).save_pretrained(tmp_path)
    read_tokenizer(str(folder / "original")).save(str(tmp_path / "tokenizer.json"))
    shutil.copy(folder / "original" / "tokenizer_config.json", tmp_path)
    engine = QwenReranker(str(tmp_path), QwenPrompt(read_tokenizer(str(tmp_path)), 1024), original=True)
    assert engine.pads
    found = values(engine.run([engine.prepare(pair) for pair in pairs()]))
    assert found == pytest.approx(official_scores(tmp_path, TRIPLES), abs=1e-5)


def test_through_the_batcher(folder: Path, official: list[float]) -> None:
    async def main() -> list[float]:
        batching = Batching(qwen(folder), BatchSettings(max_items=5, max_tokens=700), time.monotonic_ns)
        await batching.start()
        asked = pairs()
        done = await asyncio.gather(*(batching.submit(asked[at : at + 8]) for at in (0, 8, 16)))
        await batching.stop()
        return [each.result.value for part in done for each in part]

    assert asyncio.run(main()) == pytest.approx(official, abs=1e-5)


def test_a_cut_document_is_its_beginning(folder: Path) -> None:
    engine = qwen(folder, limit=200)
    long = (INSTRUCTION, "q", "capital " * 300)
    prepared = engine.prepare(pairs([long], truncate=True)[0])
    assert (len(prepared.ids), prepared.truncated) == (200, True)
    (score,) = engine.run([prepared])
    assert isinstance(score, Score)
    assert (score.tokens, score.truncated) == (200, True)


def words_tokenizer(segmented: bool) -> PreTrainedTokenizerFast:
    """A word is a token; pairs as BERT or as XLM-RoBERTa joins them."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {word: at for at, word in enumerate([*special, *WORDS, "what", "?", *map(str, range(24))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1" if segmented else "<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segmented else [])]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_input_names=names, model_max_length=100
    )


def make_cross_encoder(folder: Path, *, bert: bool) -> str:
    words = words_tokenizer(segmented=bert)
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_labels": 1,
        "initializer_range": 0.5,
        "pad_token_id": 1,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    if bert:
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
    else:
        XLMRobertaForSequenceClassification(XLMRobertaConfig(type_vocab_size=1, **sizes)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def cross_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_cross_encoder(tmp_path_factory.mktemp(request.param), bert=request.param == "bert")


def test_a_cross_encoder_gives_what_predict_gives(cross_encoder: str) -> None:
    engine = CrossEncoderReranker(cross_encoder, None)
    asked = [(query, document) for _, query, document in TRIPLES]
    expected = CrossEncoder(cross_encoder).predict(asked).tolist()
    plain = pairs([("", query, document) for query, document in asked])
    ready = [engine.prepare(pair) for pair in plain]
    assert values(engine.run(ready)) == pytest.approx(expected, abs=1e-5)
    assert [value for one in ready for value in values(engine.run([one]))] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_a_cross_encoder_cuts_as_its_library_does(cross_encoder: str) -> None:
    engine = CrossEncoderReranker(cross_encoder, 40)
    long = Pair("what is 1", "capital is " * 40, "query", "documents[0]", truncate=True)
    prepared = engine.prepare(long)
    words = CrossEncoder(cross_encoder).tokenizer
    expected = words(long.query, long.document, truncation="only_second", max_length=40)
    assert (prepared.ids, prepared.truncated) == (expected["input_ids"], True)
    with pytest.raises(BadAskError, match=r"documents\[0\] has 80 tokens, and \d+ fit"):
        engine.prepare(Pair("what is 1", long.document, "query", "documents[0]"))
    with pytest.raises(BadAskError, match="takes no instruction"):
        engine.prepare(Pair("q", "d", "query", "documents[0]", instruction="task"))


def test_a_model_with_several_labels_is_no_reranker(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=80, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    words_tokenizer(segmented=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has 3 labels: a reranker has one"):
        CrossEncoderReranker(str(tmp_path), None)


def test_what_is_no_number_fails_alone(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "original")
    words = read_tokenizer(str(folder / "original"))
    with torch.no_grad():
        model.get_input_embeddings().weight[words.token_to_id("Z")] = float("nan")
    model.save_pretrained(tmp_path / "original")
    words.save(str(tmp_path / "original" / "tokenizer.json"))
    engine = qwen(tmp_path)
    documents = [TRIPLES[0], ("", "q", "Z"), TRIPLES[2]]
    good, bad, other = engine.run([engine.prepare(pair) for pair in pairs(documents)])
    assert isinstance(good, Score)
    assert isinstance(other, Score)
    assert isinstance(bad, EngineError)
    assert str(bad).startswith("documents[1]: its score is nan")


@contextmanager
def replica(model: str, log: Path) -> Iterator[str]:
    """The guide's high-performance configuration, on whatever machine this is; gives its URL."""

    def command(port: int) -> list[str]:
        sizes = "--max-num-seqs 2048 --max-num-batched-tokens 65536 --gpu-memory-utilization 0.95 --max-workers 16"
        words = [sys.executable, "-m", "loadstone.serve.rerank", "--port", str(port), "--model", model]
        return [*words, *sizes.split(), "--tensor-parallel-size", "2"]

    with running_child("rerank", command, log) as url:
        yield url


def test_a_replica_of_qwen3_reranker(folder: Path, official: list[float], tmp_path: Path) -> None:
    with replica(str(folder / "original"), tmp_path / "log") as url:
        health = json.loads(fetch(url, "/health").body)
        told = [health[key] for key in ("engine", "max_num_seqs", "max_num_batched_tokens", "max_workers")]
        assert told == ["transformers", 2048, 65_536, 16]
        for at, (task, query, document) in enumerate(TRIPLES[:4]):
            answer = fetch(url, "/score", {"text_1": query, "text_2": document, "instruction": task})
            assert json.loads(answer.body)["data"][0]["score"] == pytest.approx(official[at], abs=1e-4)
        refused = fetch(url, "/rerank", {"query": "q", "documents": ["capital " * 2000]})
        assert json.loads(refused.body)["error"]["param"] == "documents[0]"


def test_a_replica_of_a_cross_encoder(tmp_path: Path) -> None:
    model = make_cross_encoder(tmp_path / "model", bert=True)
    with replica(model, tmp_path / "log") as url:
        assert json.loads(fetch(url, "/health").body)["engine"] == "cross-encoder"
        answer = fetch(url, "/rerank", {"query": "what is 1", "documents": ["capital is", "Beijing"]})
        scores = {each["index"]: each["relevance_score"] for each in json.loads(answer.body)["results"]}
    expected = CrossEncoder(model).predict([("what is 1", "capital is"), ("what is 1", "Beijing")]).tolist()
    assert [scores[0], scores[1]] == pytest.approx(expected, abs=1e-5)
