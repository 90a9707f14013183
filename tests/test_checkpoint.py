"""Saving, loading and inspecting checkpoints: round trips, other readers, and where checkpoints are found."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TinyMLP, change_config, logits, quantize_linears, relative_error, tiny_model
from safetensors.torch import load_file
from stored import change

import qcompile
from qcompile import storage
from qcompile.errors import ConfigError, FormatError, UnsupportedError
from qcompile.modules import quantized_modules

INDEX = "model.safetensors.index.json"


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


def test_what_cannot_be_saved(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="unknown format 'awqq'"):
        qcompile.save(checkpoint[0], tmp_path / "x", format="awqq")
    with torch.device("meta"):
        empty = tiny_model()
    with pytest.raises(ConfigError, match="is on the meta device"):
        qcompile.save(empty, tmp_path / "x")
    assert not (tmp_path / "x").exists()


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
