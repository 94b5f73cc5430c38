"""The command line: Lightning's own, and the stages of merging."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import yaml
from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    set_parsing_settings,
)
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from typing_extensions import override

# Imported so that their short names resolve, as in --method TIES or --data TaskSuite.
import lightning_merge.callbacks
import lightning_merge.data
import lightning_merge.methods
import lightning_merge.modules  # noqa: F401
from lightning_merge.lost import LostProcessError
from lightning_merge.strategies import FirstProcessError
from lightning_merge.trainer import MergeTrainer

OWN = ("merge", "sweep", "diagnose", "compress", "export", "import")
ABOUT = "Fine-tune experts, merge them, and steer the merged model with a preference."
COMMANDS = ("fit", "validate", "test", "predict", *OWN)


class SuiteConfig(ActionConfigFile):
    """A config file that serves all subcommands.

    Beside the groups that all of them have (``trainer``, ``model``, ``data``, ...), it may have
    one section for each subcommand, such as ``merge:`` with ``pool`` and ``output``; a subcommand
    reads the common groups and its own section.
    """

    command: str

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Apply one file."""
        super().__call__(parser, cfg, restricted(values, self.command), option_string)


def restricted(source: str, command: str) -> str:
    """Give the part of a suite's YAML that one subcommand reads, as YAML.

    Args:
        source: Path of the file, or YAML text.
        command: The subcommand.

    Raises:
        ValueError: If the file does not exist or is no YAML mapping.
    """
    path = Path(source)
    is_text = "\n" in source or ":" in source
    if not is_text and not path.is_file():
        raise ValueError(f"config file {source} does not exist (working folder {Path.cwd()}).")
    text = path.read_text(encoding="utf-8") if not is_text else source
    content = yaml.safe_load(text)
    if not isinstance(content, dict):
        raise ValueError(f"config {source} is no YAML mapping.")
    own = content.get(command) if isinstance(content.get(command), dict) else {}
    common = {key: value for key, value in content.items() if key not in COMMANDS}
    return yaml.safe_dump(_joined(common, own or {}), sort_keys=False)


def _joined(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    joined = dict(common)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(joined.get(key), dict)
        joined[key] = _joined(joined[key], value) if both else value
    return joined


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config beside the logs, where there are any."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.loggers:
            super().setup(trainer, pl_module, stage)


class MergeCLI(LightningCLI):
    """Lightning's command line with the stages of merging."""

    def __init__(self, *, args: ArgsType = None, **kwargs: Any) -> None:
        self._args = args
        super().__init__(args=args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands and the arguments of theirs that the command line fills by itself."""
        return LightningCLI.subcommands() | {name: {"model", "datamodule"} for name in OWN}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # A parser takes half a second to build: make only the one that the first word names.
        words = sys.argv[1:] if self._args is None else self._args
        first = words[0] if isinstance(words, list) and words else None
        known = self.subcommands()
        if first in known:
            self.subcommands = lambda: {first: known[first]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, model and data; the stages of merging need neither of the latter."""
        if self._building not in OWN:
            super().add_core_arguments_to_parser(parser)
            return
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({"trainer.logger": False})
        for kind, key in ((LightningModule, "model"), (LightningDataModule, "data")):
            parser.add_lightning_class_args(kind, key, subclass_mode=True, required=False)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        self._building = subcommand
        if subcommand not in OWN:
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        else:
            parser = self.init_parser(**kwargs)
            # First, so that help and printed configs begin with what the stage is about.
            self._subcommand_method_arguments[subcommand] = parser.add_method_arguments(
                klass,
                subcommand,
                skip=set(self.subcommands()[subcommand]),
                sub_configs=True,
            )
            self._add_arguments(parser)
            parser.usage = f"lightning-merge {subcommand} [-c CONFIG] [options]"
        for action in parser._actions:
            if isinstance(action, ActionConfigFile):
                action.__class__ = SuiteConfig
                cast("SuiteConfig", action).command = subcommand
        return parser

    def _add_instantiators(self) -> None:
        # They stamp hyper-parameters of the top-level model on every nested module, and fail
        # where there is no model; only a fit needs them, for load_from_checkpoint.
        if self.subcommand not in OWN:
            super()._add_instantiators()

    def before_instantiate_classes(self) -> None:
        """Build the model for a stage of merging only if the artifact cannot build its own."""
        if self.subcommand not in OWN:
            return
        config = self.config[self.subcommand]
        if self.subcommand not in ("sweep", "import"):
            config["data"] = None
        if config.get("via") == "test_step":
            return  # its test_step is what counts
        if config.get("model") is not None and _knows_its_network(config):
            config["model"] = None


def _knows_its_network(config: Any) -> bool:
    for folder, name in ((config.get("merged"), "merged.json"), (config.get("pool"), "pool.json")):
        if folder and (Path(folder) / name).is_file():
            try:
                return json.loads((Path(folder) / name).read_text("utf-8"))["model"] is not None
            except (ValueError, KeyError):
                return True  # reading it later explains what is wrong
    return True


def with_flags(words: list[str]) -> list[str]:
    """Spell ``--dry-run``, alone or with a value, as the option that it is.

    Example:
        >>> with_flags(["merge", "--dry-run", "--pool=p"]), with_flags(["--dry_run", "false"])
        (['merge', '--dry_run=true', '--pool=p'], ['--dry_run=false'])
    """
    spelled: list[str] = []
    for word in words:
        if spelled and spelled[-1] == "--dry_run=true" and word.lower() in ("true", "false"):
            spelled[-1] = f"--dry_run={word}"
        elif word in ("--dry-run", "--dry_run"):
            spelled.append("--dry_run=true")
        else:
            spelled.append(word.replace("--dry-run=", "--dry_run=", 1))
    return spelled


def main(args: ArgsType = None) -> None:
    """Run the command line; a mistake in a stage of merging ends in one line, not a traceback."""
    if isinstance(args, list):
        args = with_flags(args)
    elif args is None:
        # in place: Lightning warns of words that are not those of the process
        sys.argv[1:] = with_flags(sys.argv[1:])
    with suppress(TypeError):  # an older jsonargparse shows fields without their docstrings
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        MergeCLI(
            trainer_class=MergeTrainer,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"default_env": True, "prog": "lightning-merge", "description": ABOUT},
            args=args,
        )
    except FirstProcessError:
        sys.exit(1)  # the first process says why
    except (ValueError, OSError, KeyError, LostProcessError) as error:
        words = sys.argv[1:] if args is None else list(args)
        if not set(OWN) & set(words):
            raise  # a fit runs the user's code: its traceback matters
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"lightning-merge: error: {message}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
