"""The gate's and the client's inner loops are compiled by mypyc, where the machine has a C compiler.

It is the same Python: without a compiler that works, or with LOADSTONE_PURE set, the modules run as they are, and a
request through the gate takes twice the CPU. What else there is to say of the package is in pyproject.toml.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

COMPILED = {
    "core": "admission chunk_log drain fairness lazy_heap pacing placement quota quota_log tickets waiting",
    "wire": "connection head_memo poller reply request_head request_reader response server server_connection stamps"
    " upstream upstream_connection upstream_reply",
    "hold": "accounts endings front gate headers health latencies pages permits rate_headers relay shaping signals"
    " status tallies upstreams usage",
}
"""Modules by package: what runs for every request or chunk. Records that JSON is decoded into stay out, because they
are read from their annotations, and so do msgspec classes with options, which mypyc drops."""


def sources() -> list[str]:
    return [f"src/loadstone/{package}/{name}.py" for package, names in COMPILED.items() for name in names.split()]


def can_compile() -> bool:
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return not os.environ.get("LOADSTONE_PURE") and shutil.which(compiler) is not None and headers.is_file()


class CompileOrGoWithout(build_ext):
    """A compiler that does not work is no reason not to install."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CompileError, LinkError) as error:
            print(f"loadstone: not compiled, it will run as Python: {error}", file=sys.stderr)
            self.extensions.clear()


if __name__ == "__main__":
    modules = []
    if can_compile():
        from mypyc.build import mypycify

        # Types were checked with the tests; what is not installed while building counts as unknown.
        options = ["--config-file=", "--ignore-missing-imports", "--follow-imports=silent"]
        modules = mypycify([*options, *sources()], opt_level="2", group_name="loadstone")
    setup(ext_modules=modules, cmdclass={"build_ext": CompileOrGoWithout})
