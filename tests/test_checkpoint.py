"""Saving, loading and inspecting checkpoints: round trips, other readers, damage, and saves that do not finish."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import TinyMLP, logits, quantize_linears, relative_error, tiny_model
from safetensors.torch import load_file, save_file

import qcompile
from qcompile import storage
from qcompile.errors import ConfigError, FormatError, UnsupportedError
from qcompile.modules import quantized_modules

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small quantized Qwen3 in bfloat16, and its folder."""
    torch.manual_seed(0)
    model = quantize_linears(tiny_model(), "w4a16_g32")
    folder = tmp_path_factory.mktemp("checkpoint") / "w4"
    qcompile.save(model, folder)
    return model, folder


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of that folder, to be damaged."""
    return Path(shutil.copytree(checkpoint[1], tmp_path / "copied"))


def change(folder: Path, edit) -> None:
    """Let ``edit`` change the dict of a folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, edit) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------ round trips

MIXED = {"q_proj": "w8a8", "k_proj": "w8a8", "v_proj": "w8a8", "gate_proj": "w3a16_g32_asym", "down_proj": "w8a16"}
SYMMETRIC = MIXED | {"gate_proj": "w3a16_g32"}


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g64_asym", "w3a16_g32", "w8a16", "w8a8", "w5a16_asym", MIXED])
def test_a_loaded_model_is_the_saved_one(scheme, tmp_path):
    model = quantize_linears(tiny_model(), scheme)
    qcompile.save(model, tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    assert {n: str(m.scheme) for n, m in quantized_modules(loaded).items()} == {
        n: str(m.scheme) for n, m in quantized_modules(model).items()
    }
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen2"])
def test_families_and_dtypes(family, dtype, tmp_path):
    changes = {"n_embd": 128, "n_layer": 2, "n_head": 4} if family == "gpt2" else {}
    model = tiny_model(family, dtype, tie_word_embeddings=True, **changes)
    if family != "gpt2":  # its layers are Conv1D, which stay float
        quantize_linears(model, "w4a16_g32")
    qcompile.save(model, tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_dtype_overrides_the_stored_one(checkpoint):
    model, folder = checkpoint
    loaded = qcompile.load(folder, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert relative_error(logits(loaded), logits(model)) < 0.02


def test_scales_of_another_dtype_suit_the_fused_kernels(copied, checkpoint):
    def widen(tensors):
        tensors.update({n: t.float() for n, t in tensors.items() if n.endswith("weight_scale")})

    change(copied, widen)
    loaded = qcompile.load(copied)
    assert "cpu.reference" not in {module.kernel for module in quantized_modules(loaded).values()}
    assert torch.equal(logits(loaded), logits(checkpoint[0]))


def test_the_report_of_a_loaded_model(checkpoint):
    loaded = qcompile.load(checkpoint[1])
    report = qcompile.report(loaded)
    assert report.coverage == 1.0
    assert len(report.plan.quantized) == 14
    head = report.plan["lm_head"]
    assert (head.scheme, head.reason, head.site.role) == (None, "float in the checkpoint", "lm_head")
    planned = report.plan["model.layers.1.mlp.down_proj"]
    assert (planned.method, planned.site.block) == ("stored", "model.layers.1")
    assert planned.kernel == loaded.get_submodule(planned.site.name).kernel
    assert "stored as compressed-tensors" in str(report)


def test_inspect_reads_no_weights(checkpoint, monkeypatch):
    monkeypatch.setattr(storage.Folder, "read", None)
    plan = qcompile.inspect(checkpoint[1])
    monkeypatch.undo()
    assert plan == qcompile.report(qcompile.load(checkpoint[1])).plan
    actual = sum(t.numel() * t.element_size() for t in qcompile.load(checkpoint[1]).state_dict().values())
    assert plan.bytes_after == pytest.approx(actual, rel=0.01)


def test_float_checkpoints_load_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = qcompile.load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not qcompile.report(loaded).plan.quantized


def test_a_compiled_model_is_saved_as_what_it_was(checkpoint, tmp_path):
    model, folder = checkpoint
    qcompile.save(torch.compile(model, backend="eager"), tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()


def test_generation_config_and_tokenizer_come_along(checkpoint, copied, tmp_path):
    (copied / "tokenizer.json").write_text("{}")
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    loaded = qcompile.load(copied)
    loaded.generation_config.max_new_tokens = 7
    qcompile.save(loaded, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "again/chat_template.jinja").is_file()
    assert qcompile.load(tmp_path / "again").generation_config.max_new_tokens == 7


def test_a_loaded_model_generates(checkpoint):
    ids = torch.tensor([[3, 4, 5]])
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(qcompile.load(checkpoint[1]).generate(ids, **options), checkpoint[0].generate(ids, **options))


# ----------------------------------------------------------------------------------------------- tied output embedding


def test_a_quantized_head_is_not_tied_again(tmp_path):
    model = quantize_linears(tiny_model(tie_word_embeddings=True), "w8a16", head=True)
    qcompile.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    expected = logits(model)
    change_config(tmp_path / "saved", lambda config: config.update(tie_word_embeddings=True))
    loaded = qcompile.load(tmp_path / "saved")  # a config that claims too much does no harm
    assert torch.equal(logits(loaded), expected)
    loaded.tie_weights()
    assert torch.equal(logits(loaded), expected)


def test_tied_embeddings_are_stored_once(tmp_path):
    model = quantize_linears(tiny_model(tie_word_embeddings=True))
    qcompile.save(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved/model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_two_different_tensors_for_a_tied_one(tmp_path):
    model = quantize_linears(tiny_model(tie_word_embeddings=True))
    qcompile.save(model, tmp_path / "saved")
    change(tmp_path / "saved", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    qcompile.load(tmp_path / "saved")
    change(tmp_path / "saved", lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(FormatError, match=r"lm_head\.weight differ.*tie_word_embeddings"):
        qcompile.load(tmp_path / "saved")


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w8a16", "w8a8", "w3a16_g32", SYMMETRIC])
@pytest.mark.parametrize("head", [False, True])
def test_transformers_reads_what_is_saved(scheme, head, tmp_path):
    from transformers import AutoModelForCausalLM

    model = quantize_linears(tiny_model(tie_word_embeddings=head), scheme, head=head)
    qcompile.save(model, tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits(loaded), logits(model)) < 0.05


def test_sharded_files(tmp_path):
    from transformers import AutoModelForCausalLM

    model = quantize_linears(tiny_model())
    qcompile.save(model, tmp_path / "saved", shard_bytes=60_000)
    shards = sorted((tmp_path / "saved").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert not (tmp_path / "saved/model.safetensors").exists()
    places = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    for shard in shards:
        tensors = load_file(shard)
        assert set(tensors) == {name for name, file in places.items() if file == shard.name}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert size <= 60_000 or len(tensors) == 1
    assert torch.equal(logits(qcompile.load(tmp_path / "saved")), logits(model))
    assert relative_error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model)) < 0.05


def test_a_header_without_room_begins_a_new_file(tmp_path):
    writer = storage.ShardWriter(tmp_path, 1 << 30, header_room=1000)
    tensors = {f"{'x' * 100}.{i}": torch.full((3,), i, dtype=torch.uint8) for i in range(20)}
    tensors["halves"] = torch.ones(3, dtype=torch.bfloat16)
    tensors["y" * 5000] = torch.ones((), dtype=torch.int64)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    merged = {}
    for shard in tmp_path.glob("*.safetensors"):
        merged |= load_file(shard)
    assert merged.keys() == tensors.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())


# ------------------------------------------------------------------------------------------------------ plain modules


def test_a_module_that_is_not_of_transformers(tmp_path):
    model = quantize_linears(TinyMLP().eval(), {"first": "w4a16_g32", "last": "w8a8"})
    x = torch.randn(3, 64)
    qcompile.save(model, tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"plain module \(TinyMLP\).*pass the float module as model="):
        qcompile.load(tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved", model=TinyMLP())
    assert torch.equal(loaded(x), model(x))
    assert loaded.again is loaded.first
    with pytest.raises(ConfigError, match="quantized already"):
        qcompile.load(tmp_path / "saved", model=loaded)
    with pytest.raises(FormatError, match="must be"):
        qcompile.load(tmp_path / "saved", model=TinyMLP(32))


# ------------------------------------------------------------------------------------------- saves that do not finish


def test_the_bar_counts_bytes(checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    seen = []
    from rich.progress import Progress

    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda *a, **k: (seen.append(k["completed"]), update(*a, **k)))
    qcompile.load(checkpoint[1], progress=True)
    with storage.Folder(checkpoint[1]) as folder:
        assert folder.size[1] == seen[-1]
    assert seen == sorted(seen)
    assert len(seen) > 14
    assert "kB" in capsys.readouterr().err


def test_an_existing_folder_is_not_touched_unasked(checkpoint, copied):
    before = files(copied)
    with pytest.raises(ConfigError, match="copied exists; pass overwrite=True"):
        qcompile.save(checkpoint[0], copied)
    assert files(copied) == before


def test_overwrite_replaces_the_whole_folder(checkpoint, copied):
    (copied / "stale.safetensors").write_bytes(b"")
    qcompile.save(checkpoint[0], copied, overwrite=True)
    assert files(copied) == files(checkpoint[1])
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_a_folder_that_is_no_checkpoint_is_never_replaced(checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not the folder of a checkpoint"):
        qcompile.save(checkpoint[0], tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not the folder of a checkpoint"):
        qcompile.save(checkpoint[0], tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_changes_nothing(checkpoint, copied, monkeypatch, overwrite):
    before, add = files(copied), storage.ShardWriter.add

    def full(self, name, tensor):
        if "layers.1" in name:
            raise OSError(28, "No space left on device")
        add(self, name, tensor)

    monkeypatch.setattr(storage.ShardWriter, "add", full)
    target = copied if overwrite else copied.with_name("new")
    with pytest.raises(OSError, match="No space left"):
        qcompile.save(checkpoint[0], target, overwrite=overwrite)
    assert files(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


def test_the_old_folder_returns_when_the_new_one_cannot_be_renamed(checkpoint, copied, monkeypatch):
    before, rename = files(copied), Path.rename

    def refuse(self, target):
        if self.name.endswith("partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        qcompile.save(checkpoint[0], copied, overwrite=True)
    assert files(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["copied"]


KILLED = """
    import os, signal, sys, torch
    sys.path.insert(0, {tests!r})
    import qcompile
    from qcompile import storage
    from pathlib import Path

    model = qcompile.load({source!r})
    {patch}
    qcompile.save(model, {target!r}, overwrite=True)
"""
WRITING = """
    storage.ShardWriter._write = lambda self, name, tensor: os.kill(os.getpid(), signal.SIGKILL)
"""
RENAMING = """
    rename = Path.rename
    def kill(self, target):
        rename(self, target)
        if target.name.endswith("replaced"):
            os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = kill
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_leaves_the_old_checkpoint(moment, checkpoint, copied):
    before = files(copied)
    patch = textwrap.dedent(WRITING if moment == "writing" else RENAMING)
    code = textwrap.dedent(KILLED).format(
        tests=str(Path(__file__).parent), source=str(checkpoint[1]), target=str(copied), patch=patch
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copied.parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in copied.parent.iterdir() if path != copied]
    for path in left:
        with pytest.raises(FormatError, match=r"did not finish|interrupted save"):
            qcompile.load(path)
    if moment == "writing":
        assert len(left) == 1
        assert files(copied) == before
        left[0].rename(copied.parent / "renamed")  # even under another name it is no checkpoint
        with pytest.raises(FormatError, match="renamed holds no config"):
            qcompile.load(copied.parent / "renamed")
    else:
        with pytest.raises(FormatError, match="interrupted save put the old one aside as"):
            qcompile.load(copied)
        (aside,) = [path for path in left if path.name.endswith("replaced")]
        aside.rename(copied)
        assert files(copied) == before
    qcompile.save(checkpoint[0], copied, overwrite=True)
    assert torch.equal(logits(qcompile.load(copied)), logits(checkpoint[0]))


def test_what_cannot_be_saved(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'awqq'"):
        qcompile.save(checkpoint[0], tmp_path / "x", format="awqq")
    with torch.device("meta"):
        empty = tiny_model()
    with pytest.raises(ConfigError, match="is on the meta device"):
        qcompile.save(empty, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# -------------------------------------------------------------------------------------------------------------- damage

SCALE, PACKED = "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.weight_packed"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop(NORM), rf"missing: {NORM}"),
        (lambda t: t.pop(SCALE), rf"{SCALE} is missing"),
        (lambda t: t.pop(PACKED), rf"{PACKED} is missing"),
        (lambda t: [t.pop(n) for n in list(t) if "0.mlp.up_proj" in n], r"missing: model\.layers\.0\.mlp\.up_proj"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown to Qwen3ForCausalLM or its format: extra"),
        (lambda t: t.update({NORM: torch.ones(64)}), rf"{NORM} is F32 \[64\], but must be float \[128\]"),
        (lambda t: t.update({NORM: t[NORM].to(torch.int32)}), rf"{NORM} is I32"),
        (lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)}), rf"{NORM} is F8_E4M3"),
        (lambda t: t.update({SCALE: t[SCALE][:-1].clone()}), rf"{SCALE} is BF16 \[255, 4\]"),
        (lambda t: t.update({PACKED: t[PACKED].float()}), rf"{PACKED} is F32"),
        (lambda t: t[SCALE].fill_(float("nan")), rf"model\.safetensors: {SCALE} holds NaN"),
        (lambda t: t[SCALE][3, 1].fill_(float("inf")), rf"{SCALE} holds NaN or infinity"),
    ],
)
def test_damaged_tensors(edit, says, copied):
    change(copied, edit)
    with pytest.raises(FormatError, match=says) as error:
        qcompile.load(copied)
    assert str(copied) in str(error.value)
    if "NaN" not in says:  # that is in the data; the rest is known from the headers
        with pytest.raises(FormatError, match=says):
            qcompile.inspect(copied)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: cut(file, 100),
        lambda file: cut(file, 0),
        lambda file: file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:]),
        lambda file: file.write_bytes((10**9).to_bytes(8, "little") + file.read_bytes()[8:]),
        lambda file: file.write_bytes(file.read_bytes().replace(b'"shape"', b'"shapf"')),
        lambda file: file.write_bytes(file.read_bytes().replace(b"[128, 16]", b"[128, 99]")),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
        lambda file: file.write_bytes(b"\x80\x04pickle"),
    ],
)
def test_damaged_files(damage, copied):
    damage(copied / "model.safetensors")
    with pytest.raises(FormatError, match=r"copied/model\.safetensors is not a sound safetensors file"):
        qcompile.load(copied)


def test_a_file_that_shrinks_while_it_is_read(copied):
    with storage.Folder(copied) as folder:
        cut(copied / "model.safetensors", (copied / "model.safetensors").stat().st_size // 2)
        with pytest.raises(FormatError, match="was cut while it was read"):
            _ = [folder.read(name) for name in folder.headers]


def index_of(places: dict) -> str:
    return json.dumps({"weight_map": places})


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({NORM: "../model.safetensors"}, "not a safetensors file of this folder"),
        ({NORM: "/etc/passwd"}, "not a safetensors file of this folder"),
        ({NORM: "model.bin"}, "not a safetensors file of this folder"),
        ({NORM: 3}, "not a safetensors file of this folder"),
        ({NORM: "gone.safetensors"}, r"gone\.safetensors is not a sound"),
        ({NORM: "model.safetensors"}, r"disagree about lm_head\.weight"),
        ({"nothing": "model.safetensors"}, "disagree about"),
        ({}, "has no weight_map"),
    ],
)
def test_a_damaged_index(places, says, copied):
    (copied / INDEX).write_text(index_of(places))
    if "model.safetensors" not in places.values():
        (copied / "model.safetensors").rename(copied / "hidden")
    with pytest.raises(FormatError, match=says):
        qcompile.load(copied)


def test_two_files_that_claim_the_same_tensor(copied):
    tensors = load_file(copied / "model.safetensors")
    save_file(tensors, copied / "a.safetensors")
    save_file({NORM: tensors[NORM]}, copied / "b.safetensors")
    (copied / INDEX).write_text(index_of(dict.fromkeys(tensors, "a.safetensors") | {NORM: "b.safetensors"}))
    with pytest.raises(FormatError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        qcompile.load(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(FormatError, match=rf"a\.safetensors and its index disagree about {NORM}"):
        qcompile.load(copied)


def hub_cache(cache: Path, folder: Path, repository: str) -> None:
    """Lay a folder out as huggingface_hub keeps what it has downloaded."""
    root, revision = cache / f"models--{repository.replace('/', '--')}", "0" * 39 + "1"
    shutil.copytree(folder, root / "snapshots" / revision)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision)


def test_hub_ids_are_found_in_the_cache_without_a_network(checkpoint, tmp_path, monkeypatch):
    import socket

    from huggingface_hub import constants

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    hub_cache(tmp_path, checkpoint[1], "somebody/some-model-w4")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert torch.equal(logits(qcompile.load("somebody/some-model-w4")), logits(checkpoint[0]))
    assert len(qcompile.inspect("somebody/some-model-w4")) == 15
    qcompile.convert("somebody/some-model-w4", tmp_path / "out", format="modelslim")
    with pytest.raises(ConfigError, match=r"'somebody/other' is neither a folder nor in the local hub cache"):
        qcompile.load("somebody/other")


def test_folders_that_are_no_checkpoints(copied, tmp_path):
    with pytest.raises(FormatError, match="nowhere is not a folder"):
        qcompile.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"empty holds no config\.json"):
        qcompile.load(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"neither a folder nor in the local hub cache.*allow_download"):
        qcompile.load("nobody/has-this-model")
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pickles \(pytorch_model\.bin\)"):
        qcompile.load(copied)
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        qcompile.load(copied)


def layers(count: int):
    return lambda c: c.update(num_hidden_layers=count, layer_types=["full_attention"] * count)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda c: c["quantization_config"].update(quant_method="hqq"), UnsupportedError, "method 'hqq' is not read"),
        (lambda c: c.update(model_type="unheard_of"), FormatError, "transformers cannot build"),
        (lambda c: c.update(hidden_size=-3), FormatError, "transformers cannot build|must be"),
        (lambda c: c.update(hidden_size=256), FormatError, "weight_packed is I32|must be"),
        (layers(3), FormatError, r"missing: model\.layers\.2"),
        (layers(1), (FormatError, UnsupportedError), r"model\.layers\.1"),
    ],
)
def test_a_damaged_config(edit, error, says, copied):
    change_config(copied, edit)
    with pytest.raises(error, match=says):
        qcompile.load(copied)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_a_config_that_is_not_json(text, copied):
    (copied / "config.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(FormatError, match=r"config\.json (is not readable JSON|must hold a JSON object)"):
        qcompile.load(copied)


def test_code_of_a_checkpoint_is_never_run(copied, tmp_path):
    (copied / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_config(
        copied, lambda c: c.update(model_type="evil", auto_map={"AutoConfig": "modeling_evil.A"}, architectures=["A"])
    )
    with pytest.raises(FormatError, match="transformers cannot build"):
        qcompile.load(copied)
    assert not (tmp_path / "ran").exists()


def test_a_device_without_a_backend(checkpoint):
    with pytest.raises(UnsupportedError, match="no backend for device 'tpu'"):
        qcompile.load(checkpoint[1], device="tpu")


def test_save_pretrained_of_a_quantized_model_writes_a_checkpoint_that_loads(tmp_path):
    model = qcompile.quantize(tiny_model(), "w4a16_g32")
    copied = copy.deepcopy(model)
    copied.model.norm.weight.data.mul_(2)
    copied.save_pretrained(tmp_path / "copy")  # the copy saves itself, not what it was copied from
    assert torch.equal(logits(qcompile.load(tmp_path / "copy")), logits(copied))
    with pytest.raises(qcompile.ConfigError, match="takes a folder only, not push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()
    float_model = qcompile.dequantize(model)
    float_model.save_pretrained(tmp_path / "float")
    assert torch.equal(logits(qcompile.load(tmp_path / "float")), logits(float_model))
