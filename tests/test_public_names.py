"""The names of the root package are imported when they are asked for."""

import subprocess
import sys

import pytest

import lightning_merge


def test_every_public_name_is_there_and_listed():
    assert set(lightning_merge.__all__) == set(lightning_merge.MODULES)
    for name in lightning_merge.__all__:
        value = getattr(lightning_merge, name)
        assert value.__name__ == name
        assert name in dir(lightning_merge)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'lightning_merge' has no attribute 'MergeExperts'"):
        lightning_merge.MergeExperts  # noqa: B018


def test_the_methods_alone_load_no_pools_pictures_or_trainers():
    code = (
        "import sys, lightning_merge.methods, lightning_merge.shards; "
        "print([m for m in ('lightning', 'timm', 'datasets', 'matplotlib', 'torchmetrics', "
        "'lightning_merge.pool', 'lightning_merge.merged') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
