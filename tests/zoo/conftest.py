"""One pool of two gloo processes for the whole zoo: starting it is the dear part."""

from collections.abc import Iterator

import pytest

from autopar.runtime.local import LocalPool


class KeptPool:
    """A pool that is started when it is first asked for, and again after a test has broken it."""

    def __init__(self) -> None:
        self._pool: LocalPool | None = None

    def get(self) -> LocalPool:
        if self._pool is None or self._pool.is_closed:
            self._pool = LocalPool(2)
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


@pytest.fixture(scope="session")
def zoo_pool() -> Iterator[KeptPool]:
    kept = KeptPool()
    yield kept
    kept.close()


@pytest.fixture
def pool(zoo_pool: KeptPool) -> LocalPool:
    return zoo_pool.get()
