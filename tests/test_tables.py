"""Sites as rows: names that differ in their numbers are merged, and sizes are for people."""

import pytest

from qcompile import tables


class TestMergeNames:
    @pytest.mark.parametrize(
        ("names", "labels"),
        [
            (["a", "b"], ["a", "b"]),
            (["layers.0.q", "layers.1.q", "layers.2.q"], ["layers.{0..2}.q"]),
            (["layers.0.q", "layers.1.q", "layers.5.q"], ["layers.{0,1,5}.q"]),
            (["0", "2"], ["{0,2}"]),
            (["fc1", "fc2"], ["fc1", "fc2"]),
            ([f"l.{i}.e.{j}.up" for i in range(3) for j in range(4)], ["l.{0..2}.e.{0..3}.up"]),
            (["l.0.e.0.up", "l.0.e.1.up", "l.1.e.0.up"], ["l.0.e.{0,1}.up", "l.1.e.0.up"]),
        ],
    )
    def test_labels(self, names, labels):
        merged = tables.merge_names(names)
        assert [label for label, _ in merged] == labels
        assert sorted(i for _, indices in merged for i in indices) == list(range(len(names)))

    def test_many_runs_are_cut(self):
        assert tables.merge_names([f"l.{i}" for i in range(0, 94, 2)])[0][0] == "l.{0,2,4,6,8,…,92}"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_145_728, "3.1 MB"), (2.5e12, "2500.0 GB")]
)
def test_size(count, text):
    assert tables.size(count) == text
