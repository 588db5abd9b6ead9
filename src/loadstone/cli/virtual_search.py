"""``loadstone sim --virtual``: a search against the simulator in virtual time, with the truth beside its answer."""

from datetime import datetime

from loadstone.cli.progress import progress
from loadstone.cli.searching import Searched, conclude
from loadstone.cli.virtual import BASE_URL, virtual_server
from loadstone.core.settings import DataSettings, LadderSettings, OutputSettings, RuleSettings, ServerSettings
from loadstone.core.verdict import RunVerdict
from loadstone.measure.find import FindSettings, find
from loadstone.measure.runs import check_out, create_run
from loadstone.sim.clock import VirtualClock, run_virtual
from loadstone.sim.profiles import Profile
from loadstone.sim.truth import true_line


def search_in_virtual_time(
    profile: Profile,
    data: DataSettings,
    rules: RuleSettings,
    ladder: LadderSettings,
    output: OutputSettings,
    command: str,
) -> int:
    """Search ``profile`` as ``find`` would and print the true line; returns ``find``'s exit status.

    The seed of ``data`` is the profile's as well.
    """
    settings = FindSettings(
        server=ServerSettings(base_url=BASE_URL),
        data=data,
        rules=rules,
        ladder=ladder,
    )
    check_out(output.out)
    folder = create_run(output.out, f"sim-{profile.name}", datetime.now().astimezone())
    took_s = 0.0

    async def main(clock: VirtualClock) -> RunVerdict:
        nonlocal took_s
        server = virtual_server(profile, clock, data.seed, settings.server.request_timeout_s)
        with progress(output.quiet) as watcher:
            verdict = await find(server, settings, lambda model: folder, watcher, command=command)
        took_s = clock.now_ns() / 1e9
        return verdict

    status = conclude(Searched(folder.path, run_virtual(main)), quiet=output.quiet, json=output.json)
    if not output.quiet:
        print(f"{took_s / 60:.0f} virtual minutes; the truth: {_truth(profile, settings)}")
    return status


def _truth(profile: Profile, settings: FindSettings) -> str:
    rules = settings.rules
    truth = true_line(
        profile,
        settings.data.random_input_len,
        settings.data.random_output_len,
        min_success=rules.min_success,
        max_ttft_ms=rules.max_ttft_ms or float("inf"),
        max_kv_use=rules.max_kv_use,
        min_gain=rules.min_gain,
        request_timeout_s=settings.server.request_timeout_s,
    )
    lines = {"success": truth.success, "KV cache": truth.kv, "TTFT": truth.ttft, "gain": truth.gain}
    return ", ".join(f"{name} {'holds' if line is None else line}" for name, line in lines.items())
