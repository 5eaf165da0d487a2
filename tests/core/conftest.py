"""The tiny Wan of tests/helpers as fixtures, for the tests of integrations and training."""

from __future__ import annotations

import pytest
from helpers import tiny_wan


@pytest.fixture
def wan():
    """Factory of tiny Wan transformers: wan(seed=0, **config)."""
    return tiny_wan.model


@pytest.fixture
def inputs():
    """Factory of their inputs."""
    return tiny_wan.inputs


@pytest.fixture
def sla2_config():
    """Factory of fitting SLA2Configs."""
    return tiny_wan.config
