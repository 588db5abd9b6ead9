"""What a service that runs badly is advised: the documents' numbers, each at its edge."""

import pytest

from loadstone.serve.advice import Figures, advice


@pytest.mark.parametrize(
    "figures",
    [
        Figures(),
        Figures(failed_share=0.01, mean_response_s=5.0, queued=5, gpu_memory=0.9, kv_use=0.9, engine_cpu=0.89),
        Figures(oldest_in_flight_s=100.0, max_queue=10, max_num_seqs=256, free_cores=8.0),
    ],
)
def test_nothing_is_advised_where_all_is_well(figures: Figures) -> None:
    assert advice(figures) == {}


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        (
            Figures(timeouts=3, oldest_in_flight_s=97.6),
            "3 requests timed out (the oldest request runs for 98 s): check that the GPU works (nvidia-smi) and what "
            "is stuck (oldest_in_flight_s in /stats), then restart the service",
        ),
        (
            Figures(failed_share=0.032),
            "3.2% of the requests fail, above 1 %: the engines' logs and last_error tell why",
        ),
        (
            Figures(gpu_memory=0.94),
            "GPU memory is 94% full, above 90 %: lower --max-concurrency (MAX_CONCURRENT) or --max-output-tokens",
        ),
        (
            Figures(gpu_memory=0.94, kv_use=0.97),
            "GPU memory is 94% full and the KV cache is 97% full, above 90 %: lower --max-concurrency (MAX_CONCURRENT) "
            "or --max-output-tokens",
        ),
        (
            Figures(queue_full=4, max_queue=10, queued=10),
            "4 requests found the queue full: raise --max-queue from 10 to at most 20, let clients wait for "
            "Retry-After before they try again, and add instances or --workers",
        ),
        (
            Figures(queue_full=4, max_queue=20),
            "4 requests found the queue full: let clients wait for Retry-After before they try again, and add "
            "instances or --workers",
        ),
        (
            Figures(queued=6),
            "6 requests wait, more than 5: let clients wait for Retry-After before they try again, and add instances "
            "or --workers",
        ),
        (
            Figures(mean_response_s=6.24, max_num_seqs=128),
            "a response takes 6.2 s on average, above 5 s: raise --max-num-seqs from 128",
        ),
        (
            Figures(mean_response_s=6.24),
            "a response takes 6.2 s on average, above 5 s: lower --max-concurrency (MAX_CONCURRENT) to 2",
        ),
        (
            Figures(engine_cpu=0.97, free_cores=6.2, workers=1),
            "the engine is bound by the CPU (97% of its cores): raise --workers from 1: 6 cores are free",
        ),
        (
            Figures(engine_cpu=1.0, free_cores=0.4, workers=2),
            "the engine is bound by the CPU (100% of its cores): no core is free for more --workers: add instances on "
            "other machines",
        ),
    ],
)
def test_each_figure_out_of_its_band_is_one_line_with_a_remedy(figures: Figures, line: str) -> None:
    assert list(advice(figures).values()) == [line]


def test_the_gravest_comes_first() -> None:
    lines = advice(Figures(timeouts=1, failed_share=0.5, queue_full=1, mean_response_s=9.0, engine_cpu=1.0, kv_use=1.0))
    assert list(lines) == ["timeouts", "failures", "memory", "queue", "slow", "cpu"]
