"""What the tests of stage 2 train on."""

import pytest
from helpers import tiny_wan


@pytest.fixture
def data():
    """Latents and text of seven samples."""
    return tiny_wan.pairs()
