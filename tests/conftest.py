"""What every test starts from: no logging configured by another, and Hypothesis without a clock."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# A deadline would fail a test because another process has the core; each test has pytest's timeout instead. What has to
# pass before a change is taken in (.ci/run) tries the same examples each time; everybody else tries others.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "here"))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command under test configures structlog for its whole process, which is the tests' own."""
    yield
    structlog.reset_defaults()
