"""Ranks that have SGLang imported. Where it is not installed, nothing here runs: `make test-sglang` installs it."""

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.leaks import names_of_others
from tests.support.ranks import Ranks

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def no_segments_left() -> Iterator[None]:
    """Fail a test that leaves a segment of SGLang's tokenizer."""
    before = names_of_others()
    yield
    assert names_of_others() == before


@pytest.fixture(scope="session")
def engines() -> Iterator[Ranks]:
    """Processes with SGLang imported: `engines.run(4, function, *args)`."""
    with Ranks(forked=True, kept=True, preload=["tests.sglang.requests", "shmcast.integrations.sglang._link"]) as pool:
        yield pool
