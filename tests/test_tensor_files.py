import pytest
import torch
from safetensors.torch import load_file

from lightning_merge.states import LazyStateDict
from lightning_merge.tensor_files import writing_tensors

STATE = {
    "mask": torch.tensor([True, False, True]),
    "weight": torch.arange(6.0).view(2, 3).t(),
    "half": torch.tensor(1.5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "größe": torch.tensor([7], dtype=torch.int64),
    "eighth": torch.tensor([0.5], dtype=torch.float8_e4m3fn),
}


def test_safetensors_reads_what_was_written_in_any_order(tmp_path):
    path = tmp_path / "model.safetensors"
    with writing_tensors(path, STATE, {"made": "here"}) as write:
        for name in reversed(STATE):
            write(name, STATE[name])
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    read = load_file(path)
    assert read.keys() == STATE.keys()
    for name, value in STATE.items():
        assert (read[name].dtype, read[name].shape) == (value.dtype, value.shape)
        assert torch.equal(read[name].double(), value.double())
        assert read[name].data_ptr() % value.element_size() == 0
    assert LazyStateDict(path).metadata == {"made": "here"}


def test_layout_of_a_lazily_read_file(tmp_path):
    state = {name: value for name, value in STATE.items() if name != "eighth"}
    for name in ("first", "second"):
        layout = state if name == "first" else LazyStateDict(tmp_path / "first")
        with writing_tensors(tmp_path / name, layout) as write:
            for key in state:
                write(key, state[key])
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("w", torch.ones(3))], r"'w' is float32 \(3,\), expected float32 \(2,\)"),
        ([("w", torch.ones(2).half())], "'w' is float16"),
        ([("w", torch.ones(2)), ("w", torch.ones(2))], "'w' was written before"),
        ([("v", torch.ones(2))], "'v' is not in the layout"),
        ([], r"1 of 1 tensors were not written: \['w'\]"),
    ],
)
def test_what_differs_from_the_layout_leaves_the_old_file(tmp_path, tensors, message):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    with (
        pytest.raises(ValueError, match=message),
        writing_tensors(path, {"w": torch.zeros(2)}) as write,
    ):
        for name, tensor in tensors:
            write(name, tensor)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_dtype_that_cannot_be_written(tmp_path):
    state = {"w": torch.zeros(2, dtype=torch.complex64)}
    with (
        pytest.raises(ValueError, match="'w' is complex64"),
        writing_tensors(tmp_path / "a", state),
    ):
        pass
