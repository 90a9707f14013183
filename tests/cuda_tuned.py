"""A GPU, a product and tuned tiles for it, and folders without any: what the tests of tables and tuning share."""

import pytest
from hypothesis import strategies as st

from qcompile.backends.cuda import tables
from qcompile.backends.cuda.targets import Target
from qcompile.backends.cuda.tiles import Weight
from qcompile.cache import CACHE_VARIABLE

GPU = Target((9, 0), "", 132, "NVIDIA H200")
WEIGHT = Weight("w4a16", 256, 1024, group=64)
ENTRY = tables.Entry(bm=16, bn=128, bk=64, splits=2, stages=5, warps=4, us=5.0, rule_us=6.5)
WEIGHTS = st.builds(
    Weight, st.sampled_from(["w4a16", "w8a16", "int4", "int8", "fp8"]), st.sampled_from([64, 640, 4096]),
    st.sampled_from([64, 640, 4096]), st.sampled_from([0, 5, 64, 128]), st.sampled_from([0, 64, 128]),
    st.sampled_from(["", "gate_up", "down"]),
)  # fmt: skip


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Empty folders of the user and of the package."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.forget()
    yield tmp_path
    monkeypatch.undo()
    tables.forget()
