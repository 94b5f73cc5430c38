"""Every YAML block of the methods' pages makes the method it shows."""

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import lightning_merge.methods as methods
from lightning_merge.methods import ExpertStore, MergeMethod, WeightMethod

FOLDER = Path(__file__).parents[1] / "docs" / "methods"
PAGES = sorted(FOLDER.glob("*.md"))


def blocks(page):
    return re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def build(arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments((MergeMethod, ExpertStore), "method")
    return made(parser, parser.parse_object(arguments))


def made(parser, parsed):
    # the newer name first: the older one warns there
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed).method


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_yaml_makes_the_method(page):
    assert blocks(page)
    for block in blocks(page):
        assert is_dataclass(build(yaml.safe_load(block)))


def test_every_weight_method_has_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    classes = [getattr(methods, name) for name in methods.__all__]
    names = [c.__name__ for c in classes if issubclass(c, WeightMethod) and c is not WeightMethod]
    assert len(names) >= 12
    for name in names:
        assert re.search(rf"--method {name}\b|class_path: lightning_merge.methods.{name}\b", text)


def test_method_from_the_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(MergeMethod, "method")
    arguments = ["--method", "TSVMerge", "--method.scale", "0.7", "--method.exclude", '["a*"]']
    found = made(parser, parser.parse_args(arguments))
    assert found == methods.TSVMerge(scale=0.7, exclude=("a*",))
