"""The figures of the gate: ``python bench/gate.py [--quick] [--only ROW,ROW]``.

The proxies share one core, one at a time; the load generator and the mock have another. What is compared runs in turn
in the same session, because only the ratios carry over to another machine: medians [min … max] of five runs, of two
with ``--quick``. Needs gcc, and Debian's ``nginx`` and ``wrk``; ``pip install -r bench/requirements.txt``.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType

from client import machine
from gate_overload import llamacpp_overload, sim_overload, upstreams
from gate_relay import added_latency, chunks, memory, short_replies
from gate_run import Bench
from gate_storm import storms

from loadstone.wire.process import raise_open_files

ROWS: dict[str, Callable[[Bench], None]] = {
    "short": short_replies,
    "chunks": chunks,
    "latency": added_latency,
    "memory": memory,
    "sim": sim_overload,
    "llamacpp": llamacpp_overload,
    "upstreams": upstreams,
    "storm": storms,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="The figures of the gate.")
    parser.add_argument("--quick", action="store_true", help="two short runs of each: indicative only")
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, of {','.join(ROWS)}")
    options = parser.parse_args()
    names = options.only.split(",")
    cores = sorted(os.sched_getaffinity(0))
    _check(parser, names, cores)
    signal.signal(signal.SIGTERM, _stop)
    raise_open_files()
    rounds = 2 if options.quick else 5
    bench = Bench(load_core=cores[0], proxy_core=cores[1], rounds=rounds, quick=options.quick)
    print(f"{machine()}, {_versions()}; median [min … max] of {rounds}", flush=True)
    print("\n| what | figure | goal |\n| --- | --- | --- |", flush=True)
    for name in names:
        ROWS[name](bench)


def _check(parser: argparse.ArgumentParser, names: list[str], cores: list[int]) -> None:
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [tool for tool in ("gcc", "nginx", "wrk", "taskset", "setpriv") if shutil.which(tool) is None]:
        parser.error(f"not on the PATH: {', '.join(missing)}; apt-get install gcc nginx wrk util-linux")
    if len(cores) < 2:
        parser.error("needs two cores")


def _versions() -> str:
    nginx = subprocess.run(["nginx", "-v"], check=True, stderr=subprocess.PIPE, text=True).stderr
    wrk = subprocess.run(["wrk", "-v"], check=False, stdout=subprocess.PIPE, text=True).stdout
    return f"{nginx.split(':')[1].strip().replace('/', ' ')}, wrk {wrk.split()[1]}"


def _stop(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
