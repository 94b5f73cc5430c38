import pytest
import torch
from safetensors.torch import save_file

from lightning_merge.states import (
    LazyStateDict,
    check_compatible,
    check_finite,
    kind_of,
    shape_of,
    tied_names,
)


@pytest.fixture
def state():
    return {
        "a": torch.arange(6.0).view(2, 3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "count": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def lazy(state, tmp_path):
    save_file(state, tmp_path / "x.safetensors", metadata={"who": "me"})
    return LazyStateDict(tmp_path / "x.safetensors")


def test_lazy_mapping_equals_what_was_saved(state, lazy):
    assert set(lazy) == set(state)
    assert len(lazy) == len(state)
    assert lazy.metadata == {"who": "me"}
    for name, value in state.items():
        assert torch.equal(lazy[name], value)
        assert lazy[name].dtype == value.dtype
        assert shape_of(lazy, name) == shape_of(state, name) == tuple(value.shape)
        assert kind_of(lazy, name) == kind_of(state, name)
    assert "b" not in lazy
    with pytest.raises(KeyError, match="b"):
        lazy["b"]


def test_kinds_that_cannot_be_merged():
    state = {
        "complex": torch.zeros(1, dtype=torch.complex64),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.zeros(1, device="meta"),
        "float8": torch.zeros(1).to(torch.float8_e4m3fn),
    }
    for name in state:
        assert kind_of(state, name) == name
    with pytest.raises(ValueError, match=r"the base: 1 parameters complex.*sparse.*meta"):
        check_compatible(state, {"t": state})


@pytest.mark.parametrize("size", [0, 3, 40])
def test_truncated_file_is_an_error_that_names_it(tmp_path, state, size):
    path = tmp_path / "cut.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        LazyStateDict(path)


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.safetensors is not a readable"):
        LazyStateDict(tmp_path / "nothing.safetensors")


def test_ties():
    shared = torch.ones(3)
    state = {"a": shared, "b": torch.ones(3), "c": shared, "d": shared[:2], "e": shared.view(1, 3)}
    assert tied_names(state) == {"c": "a"}
    empty = torch.zeros(0)
    assert tied_names({"a": empty, "b": empty}) == {}


def test_all_differences_come_in_one_message():
    base = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    experts = {
        "cars": {"a": torch.zeros(2), "b": torch.zeros(4), "c": torch.tensor([1])},
        "dogs": {"a": torch.zeros(2), "c": torch.zeros(1), "z": torch.zeros(1)},
        "fine": base,
    }
    with pytest.raises(ValueError, match="Experts must be fine-tuned from this base") as caught:
        check_compatible(base, experts)
    message = str(caught.value)
    assert (
        "expert 'cars': 1 parameters of another shape than in the base: 'b' (4,) vs (3,)" in message
    )
    assert "expert 'cars': 1 parameters of another kind than in the base: 'c' integer" in message
    assert "expert 'dogs': 1 parameters missing: b" in message
    assert "expert 'dogs': 1 parameters not in the base: z" in message
    assert "'fine'" not in message


def test_five_are_shown_and_the_rest_counted():
    base = {f"p{i}": torch.zeros(1) for i in range(8)}
    with pytest.raises(ValueError, match=r"8 parameters missing: p0, p1, p2, p3, p4, … \(3 more\)"):
        check_compatible(base, {"t": {}})


def test_no_experts():
    with pytest.raises(ValueError, match="no experts"):
        check_compatible({"a": torch.zeros(1)}, {})


def test_expert_that_tore_a_tie():
    shared = torch.zeros(2)
    base = {"a": shared, "b": shared}
    check_compatible(base, {"t": {"a": torch.ones(2), "b": torch.ones(2)}})
    with pytest.raises(ValueError, match="'b' and 'a'"):
        check_compatible(base, {"t": {"a": torch.ones(2), "b": torch.zeros(2)}})


def test_check_finite():
    check_finite("w", "the base", torch.zeros(3))
    check_finite("w", "the base", torch.tensor([1]))
    with pytest.raises(
        ValueError, match="expert 'x': parameter 'w' holds 2 non-finite values of 3"
    ):
        check_finite("w", "expert 'x'", torch.tensor([1.0, float("nan"), float("inf")]))


def test_finite_values_of_eight_bits_are_an_error_too():
    with pytest.raises(ValueError, match=r"the base: parameter 'w' is of torch.float8_e5m2.*conv"):
        check_finite("w", "the base", torch.zeros(3).to(torch.float8_e5m2))


def test_results_do_not_depend_on_the_length_of_a_header(tmp_path):
    inputs = torch.randn(301, 6, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    expected = [part @ weight.T for part in inputs.split(8)]
    for number in range(0, 64, 8):
        path = tmp_path / f"{number}.safetensors"
        save_file({"inputs": inputs}, path, metadata={"seconds": "0" * number})
        state = LazyStateDict(path)
        for at, features in zip(range(0, 301, 8), expected, strict=True):
            assert torch.equal(state.rows("inputs", slice(at, at + 8)) @ weight.T, features)
