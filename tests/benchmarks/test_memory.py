import pytest

from benchmarks import memory


def test_a_merge_of_files_holds_a_few_parameters_not_the_models(tmp_path):
    # eight experts of 42 MB; the process itself, torch included, takes about 0.2 GB
    memory.write_models(tmp_path, gigabytes=0.042, shape=(512, 512))
    before = memory.run("Average", tmp_path, experts=1, limit=2.0)["anonymous_gb"]
    for method in ("Average", "TIES"):
        found = memory.run(method, tmp_path, experts=8, limit=2.0)
        assert found["anonymous_gb"] - before < 0.1


def test_the_limit_is_enforced(tmp_path):
    memory.write_models(tmp_path, gigabytes=0.001, shape=(64, 64))
    with pytest.raises(MemoryError, match="anonymous memory of"):
        memory.run("Average", tmp_path, experts=1, limit=0.01)
