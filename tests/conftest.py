from __future__ import annotations

import pytest
import torch

from malib import DiT, Store

from . import architectures

torch.set_num_threads(2)


@pytest.fixture(scope="session", params=["flux", "sd3", "sana"])
def any_dit(request: pytest.FixtureRequest) -> DiT:
    """A tiny random model of each architecture, without a cache."""
    return DiT(architectures.build(request.param), name=f"tiny-{request.param}", cache=False, batch_size=4)


@pytest.fixture(scope="session")
def flux_dit() -> DiT:
    return DiT(architectures.build("flux"), name="tiny-flux", cache=False, batch_size=4)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")
