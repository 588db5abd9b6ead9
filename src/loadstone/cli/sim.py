"""``loadstone sim``: a simulated model server on a real port."""

from typing import TYPE_CHECKING, Annotated

import cyclopts

from loadstone.cli.command import CommandLine
from loadstone.cli.find import FLAT
from loadstone.core.settings import LadderSettings, OutputSettings, RuleSettings

if TYPE_CHECKING:
    from loadstone.sim.profiles import Profile

_RULES = RuleSettings()
_LADDER = LadderSettings()
_OUTPUT = OutputSettings()


def sim(
    *,
    profile: Annotated[str, cyclopts.Parameter(help="Which simulated server; an unknown name lists them all.")] = (
        "soft-knee"
    ),
    host: Annotated[str, cyclopts.Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, cyclopts.Parameter(help="Port to listen on; 0 takes a free one.")] = 0,
    max_num_seqs: Annotated[int | None, cyclopts.Parameter(help="Requests in one batch at most.")] = None,
    max_num_batched_tokens: Annotated[int | None, cyclopts.Parameter(help="Tokens in one step at most.")] = None,
    num_kv_blocks: Annotated[int | None, cyclopts.Parameter(help="KV cache, in blocks of 16 tokens.")] = None,
    seed: Annotated[int, cyclopts.Parameter(help="Of the profile's noise.")] = 0,
    virtual: Annotated[bool, cyclopts.Parameter(help="No port: a whole search in virtual time.", negative=())] = False,
    random_input_len: Annotated[
        int, cyclopts.Parameter(help="With --virtual: prompt tokens; 0 = 512, which a profile's line is quoted for.")
    ] = 0,
    random_output_len: Annotated[
        int, cyclopts.Parameter(help="With --virtual: tokens to generate; 0 = the profile's own.")
    ] = 0,
    rules: Annotated[RuleSettings, FLAT] = _RULES,
    ladder: Annotated[LadderSettings, FLAT] = _LADDER,
    output: Annotated[OutputSettings, FLAT] = _OUTPUT,
    command: CommandLine = "",
) -> int:
    """Run a simulated continuous-batching engine behind an OpenAI-compatible HTTP port until interrupted.

    With --virtual no port is opened: `find` searches it in virtual time, minutes in seconds, and the true line is
    printed beside the answer. The rules, the ladder and the output are those of `find`.
    """
    import uvloop

    from loadstone.core.errors import EXIT_OK
    from loadstone.core.settings import DataSettings
    from loadstone.sim.profiles import named

    chosen = named(profile).with_overrides(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, num_kv_blocks=num_kv_blocks
    )
    if virtual:
        from loadstone.cli.virtual_search import search_in_virtual_time

        data = DataSettings(
            random_input_len=random_input_len or DataSettings.random_input_len,
            random_output_len=random_output_len or chosen.default_output_tokens,
            seed=seed,
        )
        return search_in_virtual_time(chosen, data, rules, ladder, output, command)
    uvloop.run(_serve(chosen, host, port, seed))
    return EXIT_OK


async def _serve(profile: "Profile", host: str, port: int, seed: int) -> None:
    import asyncio
    import signal

    from loadstone.core.errors import UsageError
    from loadstone.sim.server import SimServer
    from loadstone.wire.clock import MonotonicClock
    from loadstone.wire.process import raise_open_files

    raise_open_files()
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    clock = MonotonicClock(loop)
    server = SimServer(profile, clock, seed=seed)
    try:
        bound = await server.start(host, port)
    except OSError as error:
        clock.close()
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    print(f"loadstone sim: ready on http://{shown}:{bound} (profile {profile.name})", flush=True)
    try:
        await stopped.wait()
    finally:
        await server.stop()
        clock.close()
