import json

import pytest
import torch

from lightning_merge.methods import TaskArithmetic
from lightning_merge.shards import INDEX, ShardedStateDict, write_sharded
from tests.methods.models import models


def sizes(state):
    return {name: value.nbytes for name, value in state.items()}


def test_merge_streamed_into_shards_and_out_of_them(tmp_path):
    base, experts = models(2)
    merged = TaskArithmetic().merge(base, experts)
    files = write_sharded(tmp_path, TaskArithmetic().stream(base, experts), base, max_bytes=500)
    assert [f.name for f in files] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes(base).values())
    read = ShardedStateDict(tmp_path)
    assert list(read) == list(base)
    assert len(read) == len(base)
    assert all(torch.equal(read[name], merged[name]) for name in base)
    for name, value in base.items():
        assert read.shape(name) == tuple(value.shape)
        assert read.kind(name) == "floating"
        assert read.dtype(name) == "float32"
    again = TaskArithmetic().merge(read, {"a": read})
    assert all(torch.equal(again[name], read[name]) for name in base)


def test_one_file_has_no_index(tmp_path):
    base, _ = models(1)
    (path,) = write_sharded(tmp_path, base.items(), base)
    assert path.name == "model.safetensors"
    assert not (tmp_path / INDEX).exists()


def test_tied_tensors_are_written_under_both_names(tmp_path):
    shared = torch.arange(3.0)
    state = {"a": shared, "b": shared}
    write_sharded(tmp_path, state.items(), state, max_bytes=1)
    read = ShardedStateDict(tmp_path)
    assert torch.equal(read["b"], shared)


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="not a readable index"):
        ShardedStateDict(tmp_path)
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        write_sharded(tmp_path, [], {}, max_bytes=0)
    base, _ = models(1)
    write_sharded(tmp_path, base.items(), base, max_bytes=500)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"names 1 tensors no file holds: \['ghost'\]"):
        ShardedStateDict(tmp_path)
