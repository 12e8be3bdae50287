"""Backbones and a composite as the composite's own tests have them."""

from tests.vlm.conftest import backbones, composite, processor  # noqa: F401  # fixtures
