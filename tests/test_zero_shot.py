import numpy as np
import pytest
import torch

from lightning_merge.data import Task, TaskSuite
from lightning_merge.zero_shot import Prompts, read_prompts, write_heads, zero_shot_weight


def encode(texts):
    rows = [np.random.default_rng(sum(map(ord, text))).normal(size=6) for text in texts]
    return torch.tensor(np.stack(rows))


class Named(Task):
    num_classes = 2
    class_names = ("old_cat", "dog")

    def train(self): ...
    def validation(self): ...
    def test(self): ...
    def calibration(self): ...


def test_weights_are_means_of_directions():
    templates = ("a {}.", "the {}, again")
    found = zero_shot_weight(encode, ["cat", "dog"], templates, scale=7.0)
    for row, name in zip(found, ["cat", "dog"], strict=True):
        texts = [f"a {name}.", f"the {name}, again"]
        vectors = [encode([text])[0].numpy() for text in texts]
        mean = np.mean([v / np.linalg.norm(v) for v in vectors], axis=0)
        np.testing.assert_allclose(row, 7 * mean / np.linalg.norm(mean), rtol=1e-5)


def test_underscores_of_class_names_become_spaces(tmp_path):
    seen = []

    def recorded(texts):
        seen.extend(texts)
        return encode(texts)

    prompts = {"pets": Prompts(templates=("a {}",))}
    write_heads(TaskSuite({"pets": Named()}), prompts, recorded, tmp_path)
    assert seen == ["a old cat", "a dog"]


def test_bad_prompts_are_refused(tmp_path):
    suite = TaskSuite({"pets": Named()})
    with pytest.raises(ValueError, match="no prompts for pets"):
        write_heads(suite, {}, encode, tmp_path)
    with pytest.raises(ValueError, match="'pets' has 2 classes, but there are 1 names"):
        prompts = {"pets": Prompts(templates=("a {}",), classes=("cat",))}
        write_heads(suite, prompts, encode, tmp_path)
    with pytest.raises(ValueError, match="no {} in the place of the class"):
        Prompts(templates=("a photo",))
    with pytest.raises(ValueError, match="templates are empty"):
        Prompts(templates=())
    path = tmp_path / "prompts.yaml"
    path.write_text("pets: [a, b]")
    with pytest.raises(ValueError, match="no mapping of tasks to 'templates'"):
        read_prompts(path)


def test_the_text_tower_of_open_clip():
    open_clip = pytest.importorskip("open_clip", reason="the extra 'clip' is not installed")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 8}
    network = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    tokenize = open_clip.SimpleTokenizer()

    def tower(texts):
        with torch.inference_mode():
            return network.encode_text(tokenize(list(texts)))

    found = zero_shot_weight(tower, ["cat", "dog", "emu"], ("a photo of a {}.",))
    assert found.shape == (3, 8)
    torch.testing.assert_close(found.norm(dim=1), torch.full((3,), 100.0))
