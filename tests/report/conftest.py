import pytest


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch):
    """Drawing at full size takes most of the time and shows no more errors."""
    monkeypatch.setattr("lightning_merge.report.pictures.DPI", 30)
