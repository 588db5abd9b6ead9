"""``loadstone judge``: the verdict of a run again, from its records and under any rules. Needs no server."""

from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from loadstone.cli.find import FLAT
from loadstone.core.settings import RuleSettings

if TYPE_CHECKING:
    RuleFlags = RuleSettings
else:
    # The same flags with the same help; None: not given, so the run's own rule stays.
    RuleFlags = make_dataclass(
        "RuleFlags",
        [(rule.name, rule.type | None, None) for rule in fields(RuleSettings)],
        bases=(RuleSettings,),
        namespace={"__module__": __name__},
        frozen=True,
    )

_AS_RECORDED = RuleFlags()
_SWITCH = Parameter(negative=())
_RULES = Parameter(group=Group("Rules, each as the run was measured unless given"))


def judge(
    run_dir: Path,
    /,
    *,
    rules: Annotated[RuleFlags, FLAT, _RULES] = _AS_RECORDED,
    write: Annotated[bool, _SWITCH] = False,
    json: Annotated[bool, _SWITCH] = False,
    quiet: Annotated[bool, _SWITCH] = False,
) -> int:
    """Judge a run again, from its records alone.

    A run folder is judged under the rules it was measured with, any rule flag overriding its own. A folder of
    benchmark results (the JSON of `vllm bench serve`, one file for each concurrency) is judged by their figures: they
    tell no intervals, so the answer is not sure. Exit status as find's.

    Parameters
    ----------
    run_dir
        A run folder, or a folder of benchmark results.
    write
        Write verdict.json, limits.toml and the report into the folder; without it nothing is written.
    json
        Print one machine-readable line last on standard output.
    quiet
        No tables.
    """
    from loadstone.cli.judging import conclude, judge_folder

    judged = judge_folder(run_dir, given(rules))
    return conclude(judged, write=write, json=json, quiet=quiet)


def given(rules: RuleSettings) -> dict[str, Any]:
    """The rules that were named on the command line, in the environment or in the configuration file."""
    values = {field.name: getattr(rules, field.name) for field in fields(rules)}
    return {name: value for name, value in values.items() if value is not None}
