"""What all tests share: one thread a process, a quiet and repeatable hypothesis, and a word on what was skipped."""

import os

# Before torch is imported: several tests run several processes on a small machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("autopar", deadline=None, derandomize=True, max_examples=30,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("autopar")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the skipped tests by reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("what was skipped, and why")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count} x {reason}")
