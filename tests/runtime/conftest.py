"""One pool of four gloo processes for all tests of the room: starting it is the dear part."""

from collections.abc import Iterator

import pytest
from local_machines import KeptPool

from autopar.runtime.local import LocalPool


@pytest.fixture(scope="session")
def kept_pool() -> Iterator[KeptPool]:
    kept = KeptPool(4)
    yield kept
    kept.close()


@pytest.fixture
def pool(kept_pool: KeptPool) -> LocalPool:
    return kept_pool.get()
