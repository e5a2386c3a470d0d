"""Fixtures: one workshop a case for the session, and the goldens, committed or live."""

import pytest

from tests.parity.oracles import PYTHON, Golden
from tests.parity.recipes import CASES
from tests.parity.workshop import Workshop

collect_ignore_glob = ["oracle_*.py"]  # scripts of the torch environment, which this one cannot import


@pytest.fixture(scope="session")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workshop]:
    return {case.name: Workshop(case, tmp_path_factory.mktemp(f"parity-{case.name}")) for case in CASES}


@pytest.fixture(params=[case.name for case in CASES])
def workshop(request: pytest.FixtureRequest, workshops: dict[str, Workshop]) -> Workshop:
    return workshops[request.param]


@pytest.fixture
def _oracles() -> None:
    if not PYTHON.exists():
        pytest.fail(f"no torch environment at {PYTHON}: make parity makes it")


@pytest.fixture(params=["committed", pytest.param("live", marks=pytest.mark.parity)])
def golden(request: pytest.FixtureRequest, workshop: Workshop) -> Golden:
    if request.param == "live":
        request.getfixturevalue("_oracles")
    return workshop.golden(request.param)
