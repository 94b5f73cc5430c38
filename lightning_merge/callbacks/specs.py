"""Plain data in, objects out: what the arguments of a callback are made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

import lightning_merge.methods  # noqa: F401 (so that short class names resolve)
from lightning_merge.correction import CorrectionOptions
from lightning_merge.merging import Correction
from lightning_merge.methods import Average, MergeMethod


def plain(value: Any) -> Any:
    """Turn mappings and sequences of any kind (Hydra's too) into dicts and lists, all through.

    Hydra's ``{_target_: path, **arguments}`` becomes ``{class_path, init_args}``.
    """
    if isinstance(value, Mapping) and "_target_" in value:
        arguments = {str(k): plain(v) for k, v in value.items() if not str(k).startswith("_")}
        return {"class_path": str(value["_target_"]), "init_args": arguments}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def build_method(spec: Any) -> MergeMethod:
    """Build a merging method from its name, or from ``{"class_path", "init_args"}``.

    Raises:
        ValueError: If the class or an argument is unknown or of the wrong type.
    """
    if spec is None:
        return Average()
    if isinstance(spec, MergeMethod):
        return spec
    return _parse(MergeMethod, "method", plain(spec), subclass=True)


def build_correction(spec: Any) -> Correction:
    """Build the correction's options from ``"paper"``, ``"none"`` or a mapping of options.

    Raises:
        ValueError: If an option is unknown or of the wrong type.
    """
    if spec is None or isinstance(spec, CorrectionOptions) or spec == "paper":
        return spec
    if spec == "none":
        return None
    options = plain(spec)
    if isinstance(options, dict) and "class_path" in options:
        if options["class_path"].rpartition(".")[2] != CorrectionOptions.__name__:
            raise ValueError(
                f"correction: '{options['class_path']}' is no CorrectionOptions. Give its options, "
                "'paper' or 'none'."
            )
        options = options.get("init_args", {})
    return _parse(CorrectionOptions, "correction", options, subclass=False)


def _parse(kind: type, name: str, spec: Any, *, subclass: bool) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    if subclass:
        parser.add_subclass_arguments(kind, name, required=True)
    else:
        parser.add_argument(f"--{name}", type=kind, required=True)
    try:
        parsed = parser.parse_object({name: spec})
    except ArgumentError as error:
        raise ValueError(f"{name}: {error}") from error
    # The older name, of jsonargparse up to 4.4x, warns that it goes away.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(parsed)[name]
