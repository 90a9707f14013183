"""Run by CI against an installed wheel: ``python smoke.py WHERE_IT_IS_INSTALLED EMPTY_FOLDER``."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import qcompile


def main(installed: Path, folder: Path) -> None:
    assert installed in Path(qcompile.__file__).parents, f"this is {qcompile.__file__}"
    assert (installed / "qcompile" / "py.typed").is_file()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, num_key_value_heads=1, head_dim=32, vocab_size=128)
    float_model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = qcompile.quantize(float_model, "w4a16_g32")
    assert "<main" in qcompile.report(model).to_html()
    qcompile.save(model, folder)
    ids = torch.arange(8)[None]
    assert torch.equal(qcompile.load(folder)(ids).logits, model(ids).logits)
    print(f"qcompile {qcompile.__version__} from a wheel: quantized, saved and loaded")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
