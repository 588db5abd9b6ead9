"""Which engine, how many replicas, and what is said of it: tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadstone.core.errors import UsageError
from loadstone.core.settings import ServeSettings
from loadstone.serve.planning import WITHOUT_EFFECT, Kind, Machine, Share, choose_engine, divided, ineffective, place

TWO_CORES = Machine(cores=(0, 1))
ONE_GPU = Machine(cores=(0, 1, 2, 3), gpus=("0",), vllm=True)
FOUR_GPUS = Machine(cores=(0, 1, 2, 3), gpus=("0", "1", "2", "3"), vllm=True)


@pytest.mark.parametrize(
    ("kind", "asked", "machine", "gguf", "engine"),
    [
        (Kind.CHAT, "auto", ONE_GPU, False, "vllm"),
        (Kind.CHAT, "auto", Machine((0,), ("0",), vllm=False), False, "transformers"),
        (Kind.CHAT, "auto", Machine((0,), vllm=True), False, "transformers"),
        (Kind.CHAT, "auto", ONE_GPU, True, "llamacpp"),
        (Kind.CHAT, "vllm", Machine((0,), vllm=True), False, "vllm"),
        (Kind.RERANK, "auto", ONE_GPU, False, "vllm"),
        (Kind.RERANK, "auto", TWO_CORES, False, "auto"),
        (Kind.RERANK, "cross-encoder", ONE_GPU, False, "cross-encoder"),
        (Kind.EMBED, "auto", ONE_GPU, False, "auto"),
        (Kind.EMBED, "siglip", TWO_CORES, False, "siglip"),
    ],
)
def test_the_engine(kind: Kind, asked: str, machine: Machine, gguf: bool, engine: str) -> None:
    assert choose_engine(kind, ServeSettings(engine=asked), machine, gguf=gguf) == engine


@pytest.mark.parametrize(
    ("kind", "asked", "gguf", "says"),
    [
        (Kind.CHAT, "tgi", False, "--engine tgi: serve chat has vllm, llamacpp, transformers and auto"),
        (Kind.EMBED, "vllm", False, "--engine vllm: serve embed has sentence, siglip and auto"),
        (Kind.CHAT, "vllm", True, "--engine vllm cannot run a GGUF file"),
        (Kind.CHAT, "vllm", False, "--engine vllm: this interpreter has no vLLM; name one"),
        (Kind.RERANK, "auto", True, "serve rerank cannot run a GGUF file"),
    ],
)
def test_an_engine_that_cannot_be(kind: Kind, asked: str, gguf: bool, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        choose_engine(kind, ServeSettings(engine=asked), TWO_CORES, gguf=gguf)


def test_replicas_share_the_cores() -> None:
    assert place(ServeSettings(workers=2), TWO_CORES, "transformers").shares == (Share((0,)), Share((1,)))
    crowded = place(ServeSettings(workers=4), TWO_CORES, "transformers")
    assert [share.cores for share in crowded.shares] == [(0,), (1,), (0,), (1,)]
    assert crowded.notes == (
        "--workers 4: 4 replicas share 2 cores; more replicas than cores cost memory and gain nothing",
    )


def test_a_gpu_is_never_asked_for_more_than_it_has() -> None:
    asked = ServeSettings(workers=2, gpu_memory_utilization=0.9)
    placed = place(asked, ONE_GPU, "vllm")
    assert placed.shares == (Share((0, 1, 2, 3), ("0",)),)
    assert placed.notes == (
        "--workers 2 becomes 1: a replica takes 1 GPU of 1 GPU; 2 would ask for 1.8 × their memory",
    )
    assert place(asked, FOUR_GPUS, "vllm").notes == ()
    assert [share.gpus for share in place(asked, FOUR_GPUS, "vllm").shares] == [("0",), ("1",)]


def test_tensor_parallel_replicas_have_their_gpus_to_themselves() -> None:
    asked = ServeSettings(workers=4, tensor_parallel_size=2, gpu_memory_utilization=0.95)
    placed = place(asked, FOUR_GPUS, "vllm")
    assert [share.gpus for share in placed.shares] == [("0", "1"), ("2", "3")]
    assert placed.notes[0].endswith("a replica takes 2 GPUs of 4 GPUs; 4 would ask for 1.9 × their memory")
    with pytest.raises(UsageError, match="--tensor-parallel-size 2: this machine has 1 GPU; lower it"):
        place(asked, ONE_GPU, "vllm")
    assert len(place(asked, ONE_GPU, "transformers").shares) == 1
    assert "no GPU is to be seen here" in place(asked, TWO_CORES, "vllm").notes[0]


@pytest.mark.parametrize(("settings", "flag"), [({"workers": 0}, "workers"), ({"tensor_parallel_size": 0}, "tensor")])
def test_nothing_is_no_number_of_replicas(settings: dict[str, int], flag: str) -> None:
    with pytest.raises(UsageError, match=f"--{flag}"):
        place(ServeSettings(**settings), TWO_CORES, "vllm")


@given(st.integers(1, 64), st.integers(1, 80))
def test_every_core_is_used_and_evenly(cores: int, replicas: int) -> None:
    shares = divided(range(cores), replicas)
    assert len(shares) == replicas
    assert all(shares)
    if replicas <= cores:
        assert sorted(core for share in shares for core in share) == list(range(cores))
    sizes = {len(share) for share in shares}
    assert max(sizes) - min(sizes) <= 1


def test_what_means_nothing_to_an_engine_is_said() -> None:
    asked = ServeSettings(threads=4, max_workers=8, gpu_memory_utilization=0.9, tensor_parallel_size=2, workers=2)
    assert ineffective(Kind.CHAT, asked, "vllm") == [
        "--threads 4 has no effect on vllm: the engine prepares requests itself; --workers adds replicas",
        "--max-workers 8 has no effect on vllm: the engine prepares requests itself; --workers adds replicas",
    ]
    assert ineffective(Kind.RERANK, asked, "vllm") == []
    assert len(ineffective(Kind.CHAT, asked, "llamacpp")) == 4
    assert ineffective(Kind.EMBED, asked, "siglip")[0].startswith(
        "--gpu-memory-utilization 0.9 has no effect on siglip"
    )
    assert ineffective(Kind.CHAT, ServeSettings(), "llamacpp") == []


def test_the_table_names_settings_that_are_there() -> None:
    for settings in WITHOUT_EFFECT.values():
        assert set(settings) <= set(ServeSettings.__dataclass_fields__)
