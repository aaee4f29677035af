"""What holds for every test: nothing is left behind, and random inputs are the same in every CI run."""

import gc
import multiprocessing.resource_tracker
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.leaks import Snapshot, wait_until_clean
from tests.support.ranks import Ranks

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_sessionstart() -> None:
    """Start the process that spawned children share now, so that no test is blamed for it."""
    # A shell that starts a job in the background has it ignore Ctrl-C, and what it starts, too: some tests press it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.resource_tracker.ensure_running()


def pytest_collection_finish() -> None:
    """Spare every collection of garbage the objects of torch and of the tests' modules, which stay: 36 ms each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves one of our names in /dev/shm, a mapping, an fd, a thread or a child process."""
    before = Snapshot.take()
    yield
    left = wait_until_clean(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Processes with torch imported, shared by all tests: `ranks.run(4, function, *args)`."""
    with Ranks(kept=True) as pool:
        yield pool
