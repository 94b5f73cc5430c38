"""The model card of a merged model: what its manifest says, for people and for the Hub."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

COEFFICIENTS = "coefficients.png"
LONGEST = 300
"""Characters of a finding that the card still shows; the manifest has all of them."""

LOAD = """```python
from lightning_merge import MergedModel

model = MergedModel.load("path/of/this/folder"{module})
tailored = model.with_preference({preference})  # an nn.Module, as fast as one expert
scores = tailored(inputs, task="{task}")
```"""

EXPORT = """```sh
lightning-merge export --merged path/of/this/folder --output model.safetensors \\
    {preference}
```"""


def model_card(record: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """Write the model card of a merged model, in the Hugging Face Hub's form.

    The licence is the user's to fill in: a merge inherits those of the base and the experts.

    Args:
        record: What ``merged.json`` holds.
        pictures: Names of pictures beside the card.

    Returns:
        Markdown with YAML front matter.
    """
    sections = [
        _front_matter(record),
        _title(record),
        _how_it_was_merged(record),
        _tasks(record),
        _scores(record),
        _use(record),
        _found(record, pictures),
        _interference(record, pictures),
        _versions(record),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(record: Mapping[str, Any]) -> str:
    name = _base_name(record)
    known = {
        "library_name": "lightning-merge",
        "tags": ["merge", "model-merging", "multi-task", "pytorch-lightning", *_tags(record)],
        **({"base_model": name, "base_model_relation": "merge"} if name else {}),
    }
    text = yaml.safe_dump(known, sort_keys=False, allow_unicode=True)
    licence = "# license: fill in; a merge inherits the licences of the base and the experts"
    return f"---\n{licence}\n{text}---"


def _title(record: Mapping[str, Any]) -> str:
    tasks = ", ".join(record["tasks"])
    steer = (
        " A closed-form correction of the representation is folded into the heads, so that a "
        "preference over the tasks steers the model, without training."
        if _is_corrected(record)
        else " It was merged without a correction."
    )
    return (
        f"# {len(record['tasks'])} experts in one model\n\nOne backbone with a head for each of "
        f"{tasks}, merged from experts that were fine-tuned from one base.{steer}"
    )


def _is_corrected(record: Mapping[str, Any]) -> bool:
    return bool(record.get("choices"))


def _how_it_was_merged(record: Mapping[str, Any]) -> str:
    made = record["record"]
    rows = [("base", _base(record))]
    if method := made.get("method"):
        rows += [("method", f"`{method['class_path'].rpartition('.')[2]}`")]
        rows += [(name, f"`{_plain(value)}`") for name, value in method["init_args"].items()]
    if _is_corrected(record):
        rows += [(f"correction: {k}", f"`{_plain(v)}`") for k, v in record["correction"].items()]
    rows += [("batch norm", made["batch_norm"])] if made.get("batch_norm") else []
    return "## How it was merged\n\n" + _table(("", ""), rows)


def _tasks(record: Mapping[str, Any]) -> str:
    sizes = record["record"].get("calibration", {})
    if not sizes:
        return ""
    rows = [(task, f"{sizes[task]:,}" if task in sizes else "") for task in record["tasks"]]
    header = ("task", "unlabeled inputs that calibrated it")
    return "## Tasks\n\n" + _table(header, rows)


def _scores(record: Mapping[str, Any]) -> str:
    scores = record["record"].get("scores")
    if not scores:
        return ""
    tasks = list(scores["tasks"])
    rows = [
        (row.replace("_", " "), *(_number(found["raw"].get(t)) for t in tasks),
         _number(found["raw_mean"]), _number(found["normalized_mean"]))
        for row, found in scores["rows"].items()
    ]  # fmt: skip
    text = (
        f"Test {scores['metric']}; the last column is the mean over the experts' own. One-hot and "
        "priority: each task under a preference for itself.\n\n"
    )
    return "## Scores\n\n" + text + _table(("", *tasks, "mean", "of the experts'"), rows)


def _use(record: Mapping[str, Any]) -> str:
    first, *others = record["tasks"]
    preference = {first: 0.7, others[0]: 0.3} if others else {first: 1.0}
    code = LOAD.format(
        module="" if record.get("model") else ", module=network",
        preference=json.dumps(preference),
        task=first,
    )
    flags = " ".join(f"--preference.{task} {weight}" for task, weight in preference.items())
    return "\n\n".join(
        [
            "## How to use it",
            code,
            "A preference is a weight for each task, not negative, and normalised to sum to one: "
            "equal weights serve all alike, a larger weight favours its task. "
            f"`model.uncorrected()` is the merge as it is. {_module_note(record)}".strip(),
            EXPORT.format(preference=flags),
        ]
    )


def _module_note(record: Mapping[str, Any]) -> str:
    if record.get("model"):
        return ""
    return "`network` is the module that was fine-tuned, with any weights."


def _found(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    found = record.get("merge", {}).get("found")
    if not found:
        return ""
    cells = {name.replace("_", " "): _plain(value) for name, value in found.items()}
    rows = [(name, f"`{cell}`") for name, cell in cells.items() if len(cell) <= LONGEST]
    table = "## What the method found\n\n" + _table(("", ""), rows)
    return "\n\n".join([table, *_shown(name for name in pictures if name == COEFFICIENTS)])


def _shown(pictures: Iterable[str]) -> list[str]:
    return [f"![{name.partition('.')[0]}]({name})" for name in pictures]


def _interference(record: Mapping[str, Any], pictures: Sequence[str]) -> str:
    total = record.get("merge", {}).get("total")
    if not total:
        return ""
    pairs = total["cosine"]
    text = (
        "## How the experts interfere\n\n"
        f"Over the whole model, cosines of the task vectors lie between {pairs['lowest']:.2g} and "
        f"{pairs['highest']:.2g} (mean {pairs['mean']:.2g}), and two experts' signs conflict "
        f"in {total['sign_conflict']:.0%} of the entries that both changed (chance: 50%)."
    )
    return "\n\n".join([text, *_shown(name for name in pictures if name != COEFFICIENTS)])


def _versions(record: Mapping[str, Any]) -> str:
    found = record.get("versions", {})
    return "Made with " + ", ".join(f"{name} {version}" for name, version in found.items()) + "."


def _base(record: Mapping[str, Any]) -> str:
    made = record["record"]
    name, digest = _base_name(record), made.get("base_fingerprint", "")
    network = record.get("model") or {}
    kind = network.get("init_args", {}).get("model_name") or network.get("class_path")
    words = [f"`{word}`" for word in (name, kind) if word]
    return ", ".join([*dict.fromkeys(words), *([f"fingerprint `{digest[:12]}`"] if digest else [])])


def _base_name(record: Mapping[str, Any]) -> str | None:
    """The base's name on the Hub: that of a pre-trained timm model."""
    network = record.get("model") or {}
    arguments = network.get("init_args", {})
    name = arguments.get("model_name")
    if network.get("class_path") != "timm.create_model" or not arguments.get("pretrained"):
        return None
    return f"timm/{name}"


def _tags(record: Mapping[str, Any]) -> list[str]:
    method = record["record"].get("method")
    return [method["class_path"].rpartition(".")[2].lower()] if method else []


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
