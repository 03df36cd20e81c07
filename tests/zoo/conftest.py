"""One pool of two gloo processes for the whole zoo: starting it is the dear part."""

from collections.abc import Iterator

import pytest
from local_machines import KeptPool

from autopar.runtime.local import LocalPool


@pytest.fixture(scope="session")
def zoo_pool() -> Iterator[KeptPool]:
    kept = KeptPool(2)
    yield kept
    kept.close()


@pytest.fixture
def pool(zoo_pool: KeptPool) -> LocalPool:
    return zoo_pool.get()
