"""pytest's ``--benchmark``: measure and print the throughput report. Without it each benchmark runs once, unmeasured.

Here rather than in benchmarks/, since pytest reads options from the root conftest whatever paths it is given.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("mixer_kernels").addoption(
        "--benchmark",
        action="store_true",
        dest="mk_benchmark",
        help="measure the benchmarks and print the throughput report (default: run each benchmark once)",
    )


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in a trylast pytest_configure
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not config.pluginmanager.hasplugin("benchmark"):
        if option.mk_benchmark:
            raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install 'mixer_kernels[bench]'")
    elif option.mk_benchmark:
        if getattr(option, "numprocesses", None):
            raise pytest.UsageError("--benchmark measures in one process: drop -n")
        option.benchmark_only = True
        if config.args_source is not config.ArgsSource.ARGS:  # `pytest --benchmark`, no paths given
            config.args[:] = [str(config.rootpath / "benchmarks")]
    elif not (option.benchmark_only or option.benchmark_enable):
        option.benchmark_disable = True
