"""Graphs that run again without Python on the CPU: the same bits, from the memory that the caller means."""

import gc
import itertools
import threading
import weakref

import pytest
import torch
from helpers import TinyMLP, quantize_linears, tiny_model
from transformers import DynamicCache, StaticCache

import qcompile
from qcompile.backends.cpu import CPU, native, replay

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable()),
]
LENGTH = 40


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is compiled from now on."""
    made, repeat = [], CPU.repeat
    monkeypatch.setattr(CPU, "repeat", lambda *args: made.append(repeat(*args)) or made[-1])
    return made


def quantized(scheme="w4a16_g32", dtype=torch.bfloat16, **changes):
    changes = {"head_dim": 32, **changes}
    return qcompile.quantize(tiny_model(dtype=dtype, **changes), scheme)


def static_cache(model, batch=1):
    cache, config = StaticCache(config=model.config, max_cache_len=LENGTH), model.config
    cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, torch.device("cpu"))
    return cache


def tokens(count: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 150, (batch, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, cache, ids):
    """Logits of every token after the first five, one call for each."""
    cache.reset()
    model(input_ids=ids[:, :5], past_key_values=cache)
    return [model(input_ids=ids[:, i : i + 1].clone(), past_key_values=cache).logits for i in range(5, ids.shape[1])]


def recorded(graphs) -> int:
    return sum(recording is not None for graph in graphs for recording in graph.recordings.values())


@pytest.mark.parametrize(
    ("scheme", "dtype"), [("w4a16_g32_asym", torch.bfloat16), ("w8a16", torch.float16), ("w8a8", torch.float32)]
)
def test_a_decoded_token_is_replayed_to_the_bit(graphs, monkeypatch, scheme, dtype):
    model = quantized({"scheme": scheme, "rules": [{"match": "lm_head", "scheme": scheme}]}, dtype)
    compiled, plain = (torch.compile(model, backend="qcompile", options={"replay": on}) for on in (True, False))
    ids, cache, played = tokens(20), static_cache(model), []
    play = replay._Recording.play
    monkeypatch.setattr(replay._Recording, "play", lambda *args: played.append(1) or play(*args))
    results = [decode(compiled, cache, ids) for _ in range(2)]  # the second from the beginning of the same cache
    assert len(played) == 2 * 15 - 2, [graph.refusal for graph in graphs]
    torch._dynamo.reset()
    wanted = decode(plain, static_cache(model), ids)
    assert len(played) == 2 * 15 - 2
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, wanted, strict=True))


def test_a_short_prompt_is_replayed_to_the_bit(graphs):
    model = quantized("w8a8")
    cache, results = static_cache(model), []
    for options in ({}, {"replay": False}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="qcompile", options=options)
        for _ in range(4):
            cache.reset()
            with torch.no_grad():
                results.append(compiled(input_ids=tokens(9), past_key_values=cache).logits)
    assert recorded(graphs) == 1, [graph.refusal for graph in graphs]
    assert all(torch.equal(result, results[-1]) for result in results)


def test_a_linear_that_stays_float_is_replayed(graphs):
    model = quantized({"scheme": "w4a16_g32", "rules": [{"match": "*.down_proj", "scheme": "float"}]}, torch.float32)
    compiled = torch.compile(model, backend="qcompile")
    ids = tokens(12)
    for one, other in zip(
        decode(compiled, static_cache(model), ids), decode(model, static_cache(model), ids), strict=True
    ):
        assert torch.allclose(one, other, atol=1e-4)
    assert recorded(graphs) == 1, [graph.refusal for graph in graphs]


def test_two_caches_keep_their_own_tokens(graphs):
    model = quantized()
    compiled = torch.compile(model, backend="qcompile")
    caches, ids = [static_cache(model), static_cache(model)], [tokens(16, seed=1), tokens(16, seed=2)]
    for cache in caches:  # each is recorded
        decode(compiled, cache, ids[0])
    wanted = [decode(model, static_cache(model), each) for each in ids]
    assert recorded(graphs) == 2
    with torch.no_grad():
        for cache, each in zip(caches, ids, strict=True):
            cache.reset()
            compiled(input_ids=each[:, :5], past_key_values=cache)
        for i in range(5, 16):
            for cache, each, right in zip(caches, ids, wanted, strict=True):
                got = compiled(input_ids=each[:, i : i + 1], past_key_values=cache).logits
                assert torch.allclose(got, right[i - 5], atol=0.05, rtol=0.05)


def test_results_are_not_overwritten_by_the_next_call(graphs):
    model = quantized()
    results = decode(torch.compile(model, backend="qcompile"), static_cache(model), tokens(12))
    assert recorded(graphs) == 1
    assert len({result.data_ptr() for result in results}) == len(results)
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(results))


def test_weights_that_change_in_place_are_read_again_and_moved_ones_are_found(graphs):
    model = quantized()
    compiled, cache, ids = torch.compile(model, backend="qcompile"), static_cache(model), tokens(10)
    first = decode(compiled, cache, ids)
    norm = model.model.norm.weight
    with torch.no_grad():
        norm.mul_(2)
        for one, other in zip(first, decode(compiled, cache, ids), strict=True):
            assert torch.allclose(2 * one, other, rtol=0.02)
        norm.data = norm.data * 2
        for one, other in zip(first, decode(compiled, cache, ids), strict=True):
            assert torch.allclose(4 * one, other, rtol=0.02)


def test_inference_mode_and_no_grad_may_alternate(graphs):
    model = quantized()
    compiled, cache, ids = torch.compile(model, backend="qcompile"), static_cache(model), tokens(10)
    with torch.inference_mode():
        right = decode(compiled, cache, ids)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(decode(compiled, cache, ids), right, strict=True))
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(decode(compiled, cache, ids), right, strict=True))


def test_inputs_that_are_no_dense_memory_are_taken_where_they_are(graphs):
    model = quantize_linears(TinyMLP().eval(), "w8a16")
    compiled, x = torch.compile(model, backend="qcompile", dynamic=False), torch.randn(1, 64).expand(3, 64)
    with torch.no_grad():
        wanted = model(x)
        for _ in range(4):
            assert torch.allclose(compiled(x), wanted, atol=1e-5)
        assert recorded(graphs) == 1
        assert torch.allclose(compiled(torch.ones(1, 64).expand(3, 64)), model(torch.ones(3, 64)), atol=1e-5)


def test_a_growing_cache_is_never_recorded(graphs):
    model = quantized()
    compiled, cache, ids = torch.compile(model, backend="qcompile"), DynamicCache(), tokens(14)
    right = decode(model, static_cache(model), ids)
    with torch.no_grad():
        compiled(input_ids=ids[:, :5], past_key_values=cache)
        for i in range(5, 14):
            got = compiled(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
            assert torch.allclose(got, right[i - 5], atol=0.05, rtol=0.05)
    assert recorded(graphs) == 0


def test_a_recording_keeps_no_cache_alive(graphs):
    model = quantized()
    cache = static_cache(model)
    decode(torch.compile(model, backend="qcompile"), cache, tokens(10))
    assert recorded(graphs) == 1
    keys = weakref.ref(cache.layers[0].keys.untyped_storage())
    del cache
    gc.collect()
    assert keys() is None


def test_the_oldest_recording_makes_room(graphs):
    model = quantized()
    compiled = torch.compile(model, backend="qcompile")
    caches = [static_cache(model) for _ in range(replay.KEPT + 2)]
    for cache in caches:
        decode(compiled, cache, tokens(9))
    assert recorded(graphs) == replay.KEPT


def test_too_much_memory_is_not_held(graphs, monkeypatch):
    monkeypatch.setattr(replay, "MOST_HELD", 1000)
    model = quantized()
    ids = tokens(10)
    got = decode(torch.compile(model, backend="qcompile"), static_cache(model), ids)
    for one, other in zip(got, decode(model, static_cache(model), ids), strict=True):
        assert torch.allclose(one, other, atol=0.05, rtol=0.05)
    assert recorded(graphs) == 0
    assert all(not graph.refusal for graph in graphs)


def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(graphs):
    model = quantized(dtype=torch.float32, head_dim=24)  # of a width whose attention is ATen's
    compiled = torch.compile(model, backend="qcompile")
    for _ in range(3):
        with torch.no_grad():
            got, right = compiled(tokens(12, 2)).logits, model(tokens(12, 2)).logits
        assert torch.allclose(got, right, atol=1e-4)
    (graph,) = graphs
    assert "it calls aten._scaled_dot_product" in graph.refusal


def test_a_wrapper_that_is_not_python_is_refused(graphs):
    model = quantize_linears(TinyMLP().eval(), "w8a16")
    compiled = torch.compile(model, backend="qcompile", options={"cpp_wrapper": True})
    x = torch.randn(1, 64)
    with torch.no_grad():
        for _ in range(3):
            assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert "not Python that calls kernels by name" in graphs[0].refusal


def test_threads_do_not_share_recorded_memory(graphs):
    model = quantized()
    compiled = torch.compile(model, backend="qcompile")
    ids = [tokens(30, seed=seed) for seed in range(3)]
    caches = [static_cache(model) for _ in ids]
    right = [decode(compiled, cache, each) for cache, each in zip(caches, ids, strict=True)]
    found = [None] * len(ids)

    def run(i: int) -> None:
        found[i] = [decode(compiled, caches[i], ids[i]) for _ in range(5)][-1]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ids))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(found, right, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("most_serial", [replay.MOST_SERIAL, 0], ids=["one region", "a region for each op"])
def test_any_number_of_threads_repeats_the_same_bits(graphs, monkeypatch, most_serial):
    """More than there are cores as well, and other numbers than the recorded one."""
    monkeypatch.setattr(replay, "MOST_SERIAL", most_serial)
    compiled, before = torch.compile(quantized(), backend="qcompile"), torch.get_num_threads()
    ids, cache, results = tokens(12), static_cache(compiled), []
    try:
        for threads in (2, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(decode(compiled, cache, ids))
    finally:
        torch.set_num_threads(before)
    assert recorded(graphs), [graph.refusal for graph in graphs]
    for result in results:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_an_error_in_a_graph_leaves_nothing_behind(graphs):
    model = quantize_linears(TinyMLP().eval(), "w8a16")
    compiled, x = torch.compile(model, backend="qcompile"), torch.randn(1, 64)
    with torch.no_grad():
        wanted = compiled(x)
        (graph,) = graphs
        run, graph.run = graph.run, lambda inputs: 1 / 0
        with pytest.raises(ZeroDivisionError):
            compiled(x)
        graph.run = run
        for _ in range(3):
            assert torch.equal(compiled(x), wanted)
    assert recorded(graphs) == 1
