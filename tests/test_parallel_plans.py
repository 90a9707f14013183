"""Who would hold what, without any rank: from graphs and headers alone."""

from __future__ import annotations

import big_headers
import pytest
import torch
from helpers import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from moe_models import tiny_moe
from stored import golden
from typer.testing import CliRunner

import qcompile
from qcompile import numerics
from qcompile.cli import app
from qcompile.config import as_config
from qcompile.errors import ConfigError, UnsupportedError
from qcompile.parallel.sharding import shard
from qcompile.parallel.shares import runs_of
from qcompile.parallel.slices import cut, inputs_of
from qcompile.planning import find_backend, make_plan
from qcompile.trace import trace
from qcompile.types import Scheme


def sharding_of(model, tp: int, scheme: str = "w4a16_g32", **more):
    traced = trace(model)
    plan = make_plan(as_config(scheme), traced.sites, "cpu")
    return shard(plan, traced, model, find_backend("cpu"), tp, **more)


class TestDataflow:
    """Kinds and parts of the first layer."""

    def test_grouped_heads(self):
        sites = sharding_of(tiny_model("qwen3"), 2).sites
        layer = "model.layers.1.self_attn"
        assert [sites[f"{layer}.{name}_proj"].kind for name in "qkvo"] == ["column", "column", "column", "row"]
        assert sites[f"{layer}.q_proj"].parts == (((0, 64),), ((64, 128),))
        assert sites[f"{layer}.k_proj"].parts == (((0, 32),), ((32, 64),))

    def test_more_ranks_than_key_value_heads(self):
        sites = sharding_of(tiny_model("qwen3"), 4).sites
        layer = "model.layers.0.self_attn"
        assert [runs[0] for runs in sites[f"{layer}.v_proj"].parts] == [(0, 32), (0, 32), (32, 64), (32, 64)]
        assert [runs[0] for runs in sites[f"{layer}.q_proj"].parts] == [(0, 32), (32, 64), (64, 96), (96, 128)]

    def test_more_ranks_than_heads(self):
        sites = sharding_of(tiny_model("qwen3"), 8).sites
        assert {sites[f"model.layers.0.self_attn.{name}_proj"].kind for name in "qkvo"} == {"whole"}
        assert sites["model.layers.0.mlp.down_proj"].kind == "row"

    def test_fused_projections(self):
        sites = sharding_of(tiny_model("phi3"), 2).sites
        assert sites["model.layers.0.self_attn.qkv_proj"].parts[1] == ((64, 128), (160, 192), (224, 256))
        assert sites["model.layers.0.mlp.gate_up_proj"].parts[1] == ((128, 256), (384, 512))

    def test_latent_attention(self):
        sites = sharding_of(tiny_moe("deepseek_v3"), 2).sites
        layer = "model.layers.1.self_attn"
        kinds = {
            name: sites[f"{layer}.{name}"].kind for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
        }
        assert kinds == {
            "q_a_proj": "whole",
            "kv_a_proj_with_mqa": "whole",
            "q_b_proj": "column",
            "kv_b_proj": "column",
        }

    def test_a_parameter_of_each_head(self):
        tensors = sharding_of(tiny_moe("gpt_oss"), 4).tensors
        assert tensors["model.layers.0.self_attn.sinks"].parts == tuple(((rank, rank + 1),) for rank in range(4))

    def test_a_group_that_would_be_cut(self):
        share = sharding_of(tiny_model("qwen3", intermediate_size=192), 4).sites["model.layers.0.mlp.down_proj"]
        assert share.kind == "gathered"
        assert "columns 0:48 of a rank would cut through a group of 32" in share.reason

    def test_act_order_is_cut_in_the_order_of_groups(self):
        name = "model.layers.0.self_attn.o_proj"
        share = sharding_of(tiny_model("qwen3"), 2, permuted=[name]).sites[name]
        assert (share.kind, share.ordered, share.parts) == ("row", True, (((0, 64),), ((64, 128),)))

    def test_nothing_can_be_divided(self):
        with pytest.raises(
            UnsupportedError, match=r"no weight can be divided by 3: .*3 ranks do not divide its 2 units"
        ):
            sharding_of(tiny_model("qwen3"), 3)

    def test_transformers_must_agree(self):
        model = tiny_model("qwen3")
        model._tp_plan = {"model.layers.*.self_attn.q_proj": "rowwise"}
        with pytest.raises(UnsupportedError, match=r"its tp_plan does not agree: model.layers.0-1.self_attn.q_proj"):
            sharding_of(model, 2)

    def test_experts(self):
        sharding = sharding_of(tiny_moe("mixtral"), 4, ep=2)
        layout = next(iter(sharding.layouts.values()))
        assert [sharding.experts(layout, rank) for rank in range(4)] == [(0, 4), (0, 4), (4, 8), (4, 8)]
        assert [sharding.intermediate(layout, rank) for rank in range(2)] == [(0, 32), (32, 64)]
        with pytest.raises(UnsupportedError, match="ep=16 does not divide its 8 experts"):
            sharding_of(tiny_moe("mixtral"), 4, ep=16)
        with pytest.raises(ConfigError, match="one of tp and ep must be a multiple of the other"):
            sharding_of(tiny_moe("mixtral"), 4, ep=3)


@given(st.data())
def test_parts_of_a_weight_make_the_whole(data):
    """The product of the parts, each with its own inputs, summed or put together, is that of the whole."""
    scheme = Scheme.parse(
        data.draw(st.sampled_from(("w4a16_g32", "w3a16_g32_asym", "w8a16", "w2a16_g32", "wmxfp4a16")))
    )
    out, groups = data.draw(st.integers(2, 9)), data.draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(0)
    packed = numerics.quantize_weight(torch.randn(out, 32 * groups, generator=generator), scheme)
    whole = numerics.dequantize_packed(packed, torch.float32)
    edge, middle = data.draw(st.integers(1, out - 1)), 32 * data.draw(st.integers(1, groups - 1))
    rows = [cut(packed, ((0, edge),), None), cut(packed, ((edge, out),), None)]
    assert torch.equal(torch.cat([numerics.dequantize_packed(part, torch.float32) for part in rows]), whole)
    for columns in (((0, middle),), ((middle, 32 * groups),), ((0, 32), (32 * groups - 32, 32 * groups))):
        part = numerics.dequantize_packed(cut(packed, None, columns), torch.float32)
        assert torch.equal(part, whole[:, inputs_of(packed, columns)])


@given(st.sets(st.integers(0, 30)))
def test_runs(chosen):
    ordered = torch.tensor(sorted(chosen), dtype=torch.long)
    assert [i for run in runs_of(ordered) for i in range(*run)] == ordered.tolist()


class TestDryRun:
    """``inspect --tp --ep``."""

    def test_deepseek_v3(self, tmp_path):
        plan = qcompile.inspect(big_headers.deepseek_v3(tmp_path / "v3"), device="npu", tp=16, ep=32)
        notes = "\n".join(plan.notes)
        assert plan["model.layers.60.mlp.experts.gate_up_proj"].site.shape == (8, 4096, 7168)
        assert plan["model.layers.60.self_attn.o_proj"].site.shape == (7168, 1024)
        assert "32 ranks (tp=16, ep=32) hold 2" in notes
        assert "per token: 116 x all-to-all of 114.7 KB (tokens to their experts, and back)" in notes
        assert "whole on every rank: model.layers.0-60.self_attn.q_a_proj" in notes

    def test_qwen3_235b(self, tmp_path):
        folder = big_headers.qwen3_235b(tmp_path / "qwen")
        done = CliRunner().invoke(app, ["inspect", str(folder), "--tp", "16", "--ep", "32", "--device", "npu"])
        assert done.exit_code == 0, done.exception
        assert "32 ranks (tp=16, ep=32) hold 4.3 GB each, of 126.8 GB" in done.output
        assert "per token: 94 x all-reduce of 8.2 KB (sums of row parallel products)" in done.output

    def test_ep_without_experts(self):
        with pytest.raises(ConfigError, match="ep=2 deals experts to ranks, but this model has none"):
            qcompile.inspect(golden("msm-w8a8-static"), tp=2, ep=2)
