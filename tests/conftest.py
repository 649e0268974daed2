from __future__ import annotations

import pytest

from malib import DiT, Store

from . import architectures


@pytest.fixture(scope="session", params=[name for name in architectures.KNOWN if name != "flux2-dev"])
def any_dit(request: pytest.FixtureRequest) -> DiT:
    """A tiny random model of each architecture with true guidance, without a cache."""
    return DiT(architectures.build(request.param), name=request.param, cache=False, batch_size=4)


@pytest.fixture(scope="session")
def flux_dit() -> DiT:
    return DiT(architectures.build("flux"), name="tiny-flux", cache=False, batch_size=4)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """No test reads what an earlier version of the code has stored."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")
