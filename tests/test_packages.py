import pytest

from lightning_merge.packages import distribution_path, package_path


@pytest.mark.parametrize("path", ["runs/text", "/a/b", "owner/name", "C:\\data", "hub/x:y"])
def test_other_paths_stay(path):
    assert package_path(path) == path


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="'no_such_one', which is not installed: pip install no-"):
        package_path("no_such_one:model")
    with pytest.raises(ValueError, match="the package 'json' has no 'model'"):
        package_path("json:model")
    with pytest.raises(ValueError, match="no-such-one is not installed: do this"):
        distribution_path("no-such-one", "a.txt", "do this")
    with pytest.raises(ValueError, match=r"torch has no a\.txt, expected at .*: do this"):
        distribution_path("torch", "a.txt", "do this")
