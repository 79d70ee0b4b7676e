"""The released shapes, in the two parts that the reference's README describes. Slow: minutes, up to 12 GB."""

import pytest

from . import cases

pytestmark = pytest.mark.slow


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", cases.FULL)
def test_full_size(reference, name):
    found = cases.run(reference, name)
    assert len(found) >= 10
