"""A rig for the whole folder, so that the base is written and Python warmed once."""

import pytest

from faults.scenarios import QUICK, Rig


@pytest.fixture(scope="session")
def own_rig(tmp_path_factory) -> Rig:
    return Rig(tmp_path_factory.mktemp("rig"), dict(QUICK))
