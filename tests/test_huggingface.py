"""At home in transformers: quantized by from_pretrained, saved, loaded again, run by pipelines and streamers."""

import contextlib
import json
import threading

import pytest
import torch
from helpers import logits, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AutoQuantizationConfig

import qcompile
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.huggingface import Quantizer
from qcompile.modules import QuantLinear, quantized_modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory, byte_tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    tiny_model(vocab_size=320).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


def load(folder, config="w4a16_g32", **options):
    settings = qcompile.TransformersConfig(config, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


class TestQuantizeOnLoad:
    def test_equals_quantize(self, folder, model):
        expected = qcompile.quantize(AutoModelForCausalLM.from_pretrained(folder), "w4a16_g32")
        assert torch.equal(logits(model), logits(expected))
        assert isinstance(model.model.layers[0].mlp.down_proj, QuantLinear)
        assert qcompile.report(model).coverage == 1.0

    def test_shows_in_transformers_as_quantized(self, model):
        assert model.is_quantized
        assert model.hf_quantizer.quantization_config is model.config.quantization_config
        described = json.loads(model.config.to_json_string())["quantization_config"]
        assert described == {"quant_method": "qcompile", "config": {"scheme": "w4a16_g32"}}
        assert AutoQuantizationConfig.from_dict(described).config == model.config.quantization_config.config

    def test_rules_and_data(self, folder):
        config = {"scheme": "w8a8_static", "rules": [{"match": "*.down_proj", "scheme": "float"}]}
        settings = qcompile.TransformersConfig(config, data=["hello world " * 8], sequence=32)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
        assert len(quantized_modules(model)) == 12
        assert settings.options.keys() == {"data", "sequence"}  # usable for the next model
        assert model.config.quantization_config.options == {}  # and not kept alive by this one

    def test_model_type_and_dtype_are_kept(self, folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=qcompile.TransformersConfig("w8a16")
        )
        assert type(model).__name__ == "Qwen3ForCausalLM"
        assert logits(model).dtype == torch.float32

    def test_dequantize_makes_an_ordinary_model(self, folder):
        model = load(folder)
        before = logits(model)
        model.dequantize()
        assert not quantized_modules(model)
        assert not model.is_quantized
        assert not hasattr(model.config, "quantization_config")
        torch.testing.assert_close(logits(model), before, atol=0.05, rtol=0.05)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "options", "words"),
        [("rtm", {}, "Did you mean 'rtn'"), ("w4a16", {"dta": []}, "Did you mean 'data'"), ("w9a16", {}, "9")],
    )
    def test_before_anything_is_loaded(self, config, options, words):
        with pytest.raises(ConfigError, match=words):
            qcompile.TransformersConfig(config, **options)

    @pytest.mark.parametrize(
        ("device_map", "words"),
        [
            ({"model": "cpu", "lm_head": "cuda:0"}, "one device"),
            ("tpu", "no backend"),
            ({"": "cpu"}, None),
            (None, None),
        ],
    )
    def test_devices(self, device_map, words):
        quantizer = Quantizer(qcompile.TransformersConfig(), pre_quantized=False)
        with pytest.raises(UnsupportedError, match=words) if words else contextlib.nullcontext():
            quantizer.validate_environment(device_map=device_map)

    def test_a_config_file_that_names_no_format(self):
        with pytest.raises(ConfigError, match="names no format"):
            AutoHfQuantizer.from_config({"quant_method": "qcompile", "config": {}}, pre_quantized=True)

    def test_a_checkpoint_that_is_quantized_already(self, model, tmp_path):
        model.save_pretrained(tmp_path / "out")
        with pytest.raises(ValueError, match="CompressedTensorsConfig"):  # by transformers
            load(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["w4a16_g32", "w4a16_g32_asym", "w8a8", "fp8"])
def test_a_saved_checkpoint_loads_by_plain_from_pretrained(folder, tmp_path, scheme):
    model = load(folder, scheme)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] != "qcompile"
    torch.testing.assert_close(logits(again), logits(model), atol=0.1, rtol=0.1)
    assert torch.equal(logits(qcompile.load(tmp_path / "out")), logits(model))


class TestGenerate:
    PROMPT = "hello"

    def test_pipeline(self, model, folder):
        run = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
        (result,) = run(self.PROMPT, max_new_tokens=4, do_sample=False)
        assert result["generated_text"].startswith(self.PROMPT)

    def test_streams(self, model, folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        inputs = tokenizer(self.PROMPT, return_tensors="pt")
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **options, "streamer": streamer})
        thread.start()
        pieces = list(streamer)
        thread.join()
        expected = tokenizer.decode(model.generate(**inputs, **options)[0])
        assert len(pieces) > 2
        assert "".join(pieces) == expected
