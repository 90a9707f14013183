"""The recipes of CONTRIBUTING.md, followed word by word: a package of another author with one plug-in of each kind."""

import os
import re
import subprocess
import sys
from pathlib import Path

CONTRIBUTING = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()

FOLLOWED = """
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
import qcompile
from qcompile.passes import pipeline

def build():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, hidden_act="gelu")
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

ids = torch.arange(2, 12)[None]
plain, clipped = (
    qcompile.quantize(build(), {"scheme": "w4a16_g32", "method": method})(ids).logits for method in ("rtn", "clipped")
)
assert not torch.equal(plain, clipped)
try:
    qcompile.QuantConfig(method="clipped", options={"share": 2})
    raise SystemExit("a wrong option was taken")
except qcompile.ConfigError as error:
    assert "above 0 and up to 1" in str(error)

model = qcompile.quantize(build(), "w8a16")
qcompile.save(model, "saved", format="plain")
assert torch.equal(qcompile.load("saved")(ids).logits, model(ids).logits)

plan = qcompile.plan(build(), "w4a16_g32", device="slow")
assert {p.kernel for p in plan.quantized} == {"slow.reference"}

names = [pass_.name for pass_ in pipeline.compile_passes(None, ["tanh"])]
assert names.index("approximate_gelu") + 1 == names.index("fuse_gated_act_quant")
pass_ = next(p for p in pipeline.compile_passes(None, ["tanh"]) if p.name == "approximate_gelu")
from qcompile.passes.base import semantic_name
from torch.fx.experimental.proxy_tensor import make_fx
gated = lambda x: torch.ops.qcompile.gated_act(x, x, "gelu")
module = make_fx(gated)(torch.randn(2, 4, dtype=torch.bfloat16))
assert pass_(module).matches == 1
assert [n.args[2] for n in module.graph.nodes if semantic_name(n)] == ["gelu_tanh"]
module = make_fx(gated)(torch.randn(2, 4))
assert [reason for _, reason in pass_(module).rejected] == ["torch.float32 shows the difference"]
print("followed")
"""


def blocks(language: str) -> dict[str, str]:
    """Titled code blocks, by title."""
    return dict(re.findall(rf'```{language} title="(\S+)"\n(.*?)```', CONTRIBUTING, re.DOTALL))


def test_following_the_recipes_gives_working_plugins(tmp_path):
    for name, text in blocks("python").items():
        (tmp_path / name).write_text(text)
    entry_points = re.sub(
        r'\[project\.entry-points\."(.*?)"\]', r"[\1]", blocks("toml")["pyproject.toml"].replace(' = "', " = ")
    ).replace('"\n', "\n")
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("followed\n")
