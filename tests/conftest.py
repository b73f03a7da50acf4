"""What every test starts from: no logging configured by another, and Hypothesis without a clock."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import structlog

# A deadline would fail a test because another process has the core; each test has pytest's timeout instead.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command under test configures structlog for its whole process, which is the tests' own."""
    yield
    structlog.reset_defaults()
