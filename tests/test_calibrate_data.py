"""What users pass as data: every kind gives the same rows of ids, and what cannot be used says why."""

import json
from collections import UserDict

import numpy
import pytest
import torch
from helpers import TinyMLP, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

from qcompile.calibration_data import calibration_inputs, read_data, token_rows
from qcompile.errors import CalibrationError, ConfigError
from qcompile.trace import trace

IDS = torch.arange(3, 3 + 60).view(6, 10)
WORDS = " ".join(map(str, IDS.flatten().tolist()))


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def graph():
    return trace(TinyMLP(), (X,)).graph


def tokenizer(text: str) -> dict:
    """One number per word."""
    return {"input_ids": [int(word) for word in text.split()]}


def rows(model, data, **more) -> torch.Tensor:
    """The calibration rows of ``data``, of 10 tokens."""
    batches = calibration_inputs(model, data, **({"sequence": 10} | more))
    assert all(len(batch) == 1 for batch in batches)
    return torch.cat([batch for (batch,) in batches])


class Rows(Dataset):
    """A map-style dataset of dicts, as the ``datasets`` library has."""

    def __init__(self, column: str, values) -> None:
        self.column, self.values = column, values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> dict:
        return {self.column: self.values[index], "label": 1}


def padded() -> dict:
    """A left-padded batch, as a tokenizer returns it."""
    ids = torch.nn.functional.pad(IDS, (3, 0))
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


KINDS = {
    "text": lambda: WORDS,
    "texts": lambda: WORDS.rsplit(" ", 20),
    "flat tensor": lambda: IDS.flatten(),
    "tensor": lambda: IDS,
    "int32 tensor": lambda: IDS.int(),
    "list of rows": lambda: IDS.tolist(),
    "flat list": lambda: IDS.flatten().tolist(),
    "list of tensors": lambda: list(IDS),
    "list of [1, n] tensors": lambda: [row[None] for row in IDS],
    "array": lambda: IDS.numpy(),
    "list of arrays": lambda: [row.numpy() for row in IDS],
    "dict": lambda: {"input_ids": IDS},
    "batch encoding": lambda: UserDict(padded()),
    "dict of lists": lambda: {name: value.tolist() for name, value in padded().items()},
    "dict of one row": lambda: {"input_ids": IDS.flatten().tolist(), "attention_mask": [1] * 60},
    "dicts": lambda: [{"input_ids": row.tolist(), "attention_mask": [1] * 10} for row in IDS],
    "dict of texts": lambda: {"text": WORDS.rsplit(" ", 5)},
    "dataset of texts": lambda: Rows("text", WORDS.split()),
    "dataset of ids": lambda: Rows("input_ids", IDS.tolist()),
    "loader of dicts": lambda: DataLoader(Rows("input_ids", list(IDS)), batch_size=4),
    "loader of tensors": lambda: DataLoader(IDS, batch_size=4),
    "loader of ids and labels": lambda: DataLoader(TensorDataset(IDS, IDS + 1), batch_size=4),
    "generator": lambda: (row for row in IDS),
}


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_gives_the_same_rows(self, model, kind):
        assert torch.equal(rows(model, KINDS[kind](), tokenizer=tokenizer), IDS)

    def test_a_tokenizer_is_found_beside_the_model(self, model, tmp_path, monkeypatch):
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({str(i): i for i in range(100)}))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
        monkeypatch.setattr(model, "name_or_path", str(tmp_path))
        assert torch.equal(rows(model, [WORDS]), IDS)
        assert torch.equal(rows(model, [WORDS], tokenizer=str(tmp_path)), IDS)
        monkeypatch.setattr(model, "name_or_path", str(tmp_path / "nowhere"))
        with pytest.raises(ConfigError, match=r"texts need a tokenizer.*pass tokenizer="):
            rows(model, [WORDS])

    def test_no_more_is_read_than_is_used(self, model):
        def endless():
            while True:
                yield torch.ones(10, dtype=torch.long)

        assert rows(model, endless(), samples=3).shape == (3, 10)

    @given(st.lists(st.integers(0, 30)), st.integers(1, 20), st.integers(1, 5))
    def test_pieces_are_joined_and_cut(self, lengths, length, samples):
        pieces = list(torch.arange(sum(lengths)).split(lengths))
        if sum(lengths) < length:
            with pytest.raises(CalibrationError):
                token_rows(iter(pieces), length, samples)
            return
        found = token_rows(iter(pieces), length, samples)
        assert found.shape == (min(samples, sum(lengths) // length), length)
        assert torch.equal(found.flatten(), torch.arange(found.numel()))

    def test_a_sequence_is_no_longer_than_the_positions(self, model):
        many = torch.ones(600, dtype=torch.long)
        assert rows(model, many, sequence=None).shape == (4, 128)
        with pytest.raises(ConfigError, match=r"sequence=256.* positions for 128"):
            rows(model, many, sequence=256)

    def test_many_short_rows_run_together(self, model):
        batches = calibration_inputs(model, torch.ones(70, 128, dtype=torch.long), sequence=128)
        assert [len(batch) for (batch,) in batches] == [32, 32, 6]


BAD = {
    "nothing": ([], CalibrationError, "data is empty"),
    "empty rows": (torch.zeros(3, 0, dtype=torch.long), CalibrationError, "data is empty"),
    "empty mask": ({"input_ids": IDS, "attention_mask": IDS * 0}, CalibrationError, "data is empty"),
    "short": (IDS.flatten()[:7], CalibrationError, "7 tokens, less than one sequence of 10.*sequence=7"),
    "beyond the vocabulary": (IDS + 150, CalibrationError, "token id 160, but Qwen3ForCausalLM knows 0 to 159 only"),
    "negative": (IDS - 103, CalibrationError, "token id -100"),
    "floats": (IDS.float(), ConfigError, "integers, not torch.float32"),
    "three dimensions": (IDS[None], ConfigError, r"one dimension or two, not shape \[1, 6, 10\]"),
    "a number": (3, ConfigError, "not int"),
    "numbers": ([3.5, 2.5], ConfigError, "not float"),
    "bytes": (b"text", ConfigError, "not bytes"),
    "an object": (object(), ConfigError, "not object"),
    "other columns": ({"content": "text"}, ConfigError, "'input_ids' or 'text'; this mapping has 'content'"),
    "splits": ({"train": Rows("text", ["1"]), "test": Rows("text", ["1"])}, ConfigError, "has 'train', 'test'"),
    "another mask": ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, CalibrationError, "another shape"),
    "an array of texts": (numpy.array(["a", "b"]), ConfigError, "not ndarray"),
}


class TestBadData:
    @pytest.mark.parametrize("case", BAD)
    def test_it_says_what_is_wrong(self, model, case):
        data, error, message = BAD[case]
        with pytest.raises(error, match=message):
            rows(model, data, tokenizer=tokenizer)

    @pytest.mark.parametrize("option", [{"samples": 0}, {"sequence": 0}])
    def test_options_are_positive(self, model, option):
        with pytest.raises(ConfigError, match="must be at least 1"):
            rows(model, IDS, **option)


X = torch.randn(5, 64)
ITEMS = {
    "tuple": lambda: (X,),
    "tensor": lambda: X,
    "list of tensors": lambda: [X],
    "list of tuples": lambda: [(X,)],
    "list of lists with labels": lambda: [[X, torch.zeros(5)]],
    "iterator": lambda: iter([X]),
    "loader": lambda: DataLoader(TensorDataset(X, X[:, 0]), batch_size=5),
}


class TestOtherModels:
    @pytest.mark.parametrize("kind", ITEMS)
    def test_every_kind_gives_the_same_inputs(self, graph, kind):
        (inputs,) = calibration_inputs(TinyMLP(), ITEMS[kind](), graph=graph)
        assert len(inputs) == 1
        assert torch.equal(inputs[0], X)

    def test_samples_bound_the_items(self, graph):
        many = (torch.randn(n, 64) for n in range(1, 1000))
        assert [len(x) for (x,) in calibration_inputs(TinyMLP(), many, graph=graph, samples=4)] == [1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("data", "error", "message"),
        [
            ([], CalibrationError, "empty"),
            ([X, X[:, :3]], CalibrationError, r"item 1 .* input 0 is torch.float32 \[5, 3\].*float32 \[any, 64\]"),
            ([X[0]], CalibrationError, r"\[64\]"),
            ([X.double()], CalibrationError, "torch.float64"),
            ([()], CalibrationError, "0 positional inputs, and the model takes 1"),
            ([(3,)], CalibrationError, "input 0 is int, not a tensor"),
            (["text"], ConfigError, "positional inputs.*not str"),
            ([{"x": X}], ConfigError, "not dict"),
            (3, ConfigError, "not int"),
        ],
    )
    def test_what_the_graph_does_not_take_is_refused(self, graph, data, error, message):
        with pytest.raises(error, match=message):
            calibration_inputs(TinyMLP(), data, graph=graph)

    def test_ids_are_not_meant(self, graph):
        for option in ({"tokenizer": tokenizer}, {"sequence": 12}):
            with pytest.raises(ConfigError, match="is about token ids"):
                calibration_inputs(TinyMLP(), X, graph=graph, **option)


class TestFiles:
    def test_every_kind_of_file(self, model, tmp_path):
        (tmp_path / "a.txt").write_text(WORDS)
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": word}) + "\n\n" for word in WORDS.split()))
        (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, IDS.tolist())))
        save_file({"input_ids": IDS.int()}, tmp_path / "ids.safetensors")
        files = list(tmp_path.iterdir())
        assert len(files) == 4
        for file in files:
            assert torch.equal(rows(model, read_data(file), tokenizer=tokenizer), IDS)

    @pytest.mark.parametrize(
        "name", ["none.txt", "folder", "bad.jsonl", "bad.safetensors", "other.safetensors", "latin"]
    )
    def test_an_unreadable_file_is_explained(self, tmp_path, name):
        (tmp_path / "folder").mkdir()
        (tmp_path / "bad.jsonl").write_text('{"text": ')
        (tmp_path / "bad.safetensors").write_text("no")
        (tmp_path / "latin").write_bytes(b"\xe9\xe8")
        save_file({"ids": IDS}, tmp_path / "ids.safetensors")
        with pytest.raises(ConfigError, match=f"cannot read calibration data from .*{name}: ."):
            read_data(tmp_path / name)
