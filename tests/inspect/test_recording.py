"""``flexproxy.record``: what it notes of a running model, and that it leaves the model as it was."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import flexproxy
from flexproxy import ProxyConfig, stats
from flexproxy.inspect.record import Pass, Record, totals_of
from flexproxy.integrations.transformers import attention as hf_attention
from flexproxy.integrations.transformers import configure, observing
from flexproxy.pipeline import estimate
from tests.tiny_model import save_tiny_model
from tests.transformers_models import interpreted, make_model, make_tokens, use

BLOCK = 32
DENSE, SPARSE = ProxyConfig(min_budget=1024), ProxyConfig(gamma=0.6, min_budget=BLOCK, block_size=BLOCK)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model() -> Any:
    """Two layers: the first is dense, for its budget covers all keys."""
    model = make_model("llama")
    use(model, "flexproxy")
    configure(model, {0: DENSE, 1: SPARSE})
    return model


@torch.no_grad()
def run(model: Any, batch: int = 1, length: int = 300, **inputs: Any) -> None:
    with interpreted("cpu"):
        model(input_ids=make_tokens(batch, length), **({"use_cache": False} | inputs))


def observers(model: Any) -> list[Any]:
    return [module for module in model.modules() if "flexproxy_observers" in vars(module)]


def test_a_sparse_and_a_dense_layer(model: Any) -> None:
    """The numbers are those of the selection; the dense layer says why it was dense."""
    with flexproxy.record(model, mass=True, selections=True) as record:
        run(model, batch=2)
    assert sorted(record.selections) == [1]
    selection = record.selections[1]
    dense, sparse = (x[0] for x in record.layers.values())
    assert (dense.dense, dense.density, dense.mass, dense.build_ms) == ("min_budget covers all keys", None, None, None)
    assert dense.config == DENSE
    assert (sparse.num_queries, sparse.num_keys, sparse.dense, sparse.config) == (300, 300, None, SPARSE)
    torch.testing.assert_close(torch.tensor(sparse.density), selection.density())
    assert torch.tensor(sparse.kept).equal(selection.block_map().sum((-2, -1)))
    assert sparse.admissible == ((55.0,) * 4,) * 2
    assert sparse.build_ms is not None
    assert 0 < sparse.build_ms < sparse.total_ms
    assert dense.total_ms > 0


def test_attention_estimates_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is the selection that attention used, and not another one like it."""
    made = []

    def counted(*args: Any) -> Any:
        made.append(estimate(*args))
        return made[-1]

    for module in ("flexproxy.sparse.attention", "flexproxy.integrations.transformers.attention"):
        monkeypatch.setattr(f"{module}.estimate", counted)
    with flexproxy.record(model, selections=True) as record, flexproxy.record(model):
        run(model)
    assert len(made) == 1
    assert record.selections[1] is made[0]


def test_the_mass_is_that_of_the_layers_queries_and_keys(model: Any) -> None:
    kept: list[observing.Call] = []
    with flexproxy.record(model, mass=True) as record, observing.observe(model, kept.append):
        run(model)
    call = kept[1]
    assert call.selection is not None
    want = stats.recovered_mass(call.query, call.key, call.selection, scale=call.scale)
    assert want.max() < 1
    assert torch.tensor(record.layers[1][0].mass).tolist() == want.tolist()


def test_chunks_and_decode_steps_are_passes_of_their_own(model: Any) -> None:
    cache = transformers.DynamicCache()
    with flexproxy.record(model) as record, interpreted("cpu"), torch.no_grad():
        for part in make_tokens(1, 302).split([140, 140, 20, 1, 1], 1):
            model(input_ids=part, past_key_values=cache, use_cache=True)
    passes = record.layers[1]
    assert [(x.num_queries, x.num_keys) for x in passes] == [(140, 140), (140, 280), (20, 300), (1, 301), (1, 302)]
    assert [x.dense for x in passes] == [None, None, *["fewer than 128 new tokens"] * 3]
    totals = totals_of(passes)
    assert (totals.sparse, totals.dense) == (2, 3)
    first, second = passes[:2]
    assert first.kept is not None
    assert second.kept is not None
    assert (first.admissible, second.admissible) == (((15,) * 4,), ((39,) * 4,))
    together = [(a + b) / (15 + 39) for a, b in zip(first.kept[0], second.kept[0], strict=True)]
    assert totals.density == pytest.approx(together)
    assert totals.dense_ms == pytest.approx(sum(x.total_ms for x in passes[2:]))


def test_records_nest_and_end_one_by_one(model: Any) -> None:
    with flexproxy.record(model) as outer:
        with flexproxy.record(model, mass=True) as inner:
            run(model)
        run(model)
    assert [len(x) for x in outer.layers.values()] == [2, 2]
    assert [len(x) for x in inner.layers.values()] == [1, 1]
    assert outer.layers[1][0].mass is None
    assert inner.layers[1][0].mass is not None
    assert not observers(model)


def test_an_exception_leaves_the_model_as_it_was_and_the_record_as_far_as_it_came(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    def interrupted() -> None:
        with record as noted:
            collected.append(noted)
            assert len(observers(model)) == 2
            run(model)
            monkeypatch.setattr(hf_attention, "_by_blocks", broken)
            run(model)

    record, collected = flexproxy.record(model), list[Record]()
    with pytest.raises(RuntimeError, match="broken"):
        interrupted()
    assert [len(x) for x in collected[0].layers.values()] == [2, 1]
    assert not observers(model)


def test_checkpointing_counts_no_layer_twice(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = make_tokens(1, 200)
    with interpreted("cpu"), flexproxy.record(model) as record:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert [len(x) for x in record.layers.values()] == [1, 1]


def test_what_is_large_is_not_kept(model: Any) -> None:
    """Of a pass, a record holds some numbers of every head, and no map, query or key."""
    before = len(_tensors_of(1000))
    with flexproxy.record(model) as record:
        run(model)
        assert len(_tensors_of(1000)) == before
    assert record.layers


def _tensors_of(size: int) -> list[int]:
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return [id(x) for x in tensors if x.numel() > size]


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_trace_is_refused(fullgraph: bool) -> None:
    model = make_model("llama", num_hidden_layers=1)
    use(model, "flexproxy")
    torch._dynamo.reset()
    traced: Any = torch.compile(model, fullgraph=fullgraph, dynamic=False, backend="eager")
    tokens = make_tokens(1, 256)
    # With fullgraph the error is dynamo's, which names the function.
    message = "function `<function _refuse" if fullgraph else r"one compiled by torch\.compile"
    with (
        flexproxy.record(model) as record,
        torch.no_grad(),
        pytest.raises(torch._dynamo.exc.Unsupported if fullgraph else ValueError, match=message),
    ):
        traced(input_ids=tokens, use_cache=False)
    assert not record.layers
    torch._dynamo.reset()


def test_mistakes_are_named(model: Any) -> None:
    use(model, "sdpa")
    wrong: Any
    for wrong, message in (
        (model, r"model: expected attn_implementation=\"flexproxy\", got \['sdpa'\]; use model\.set_attn_impl"),
        (torch.nn.Linear(2, 2), "model: expected a model of transformers, got Linear"),
    ):
        with pytest.raises((TypeError, ValueError), match=message), flexproxy.record(wrong):
            pass


def test_the_table(model: Any) -> None:
    with flexproxy.record(model, mass=True) as record:
        assert str(record) == "LlamaForCausalLM, CPU: no forward pass"
        run(model)
    lines = str(record).splitlines()
    assert lines[0] == "LlamaForCausalLM, CPU: 1 pass with 300 queries and up to 300 keys"
    heads = "layer sparse density least most mass build ms sparse ms dense dense ms"
    assert lines[1].split() == heads.split()
    assert len({len(line) for line in lines[1:5]}) == 1
    (sparse,) = record.layers[1]
    assert sparse.density is not None
    assert sparse.mass is not None
    density, mass = sparse.density[0], sparse.mass[0]
    cells = lines[3].split()
    shown = f"{sum(density) / 4:.3f}", f"{min(density):.3f}", f"{max(density):.3f}", f"{sum(mass) / 4:.4f}"
    assert cells[:6] == ["1", "1", *shown]
    assert lines[4].split()[0] == "all"
    assert lines[-1] == "dense in 1 of 2 layer passes: min_budget covers all keys"


def test_json_is_plain_and_whole(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with flexproxy.record(model, mass=True) as record:
        run(model)
    record.save(tmp_path / "record.json")
    data = json.loads((tmp_path / "record.json").read_text())
    assert data["environment"].keys() == {"flexproxy", "torch", "transformers", "python", "device"}
    assert (data["model"]["class"], data["model"]["num_hidden_layers"]) == ("LlamaForCausalLM", 2)
    (dense,), (sparse,) = data["layers"]["0"], data["layers"]["1"]
    assert dense["dense"] == "min_budget covers all keys"
    assert sparse["config"] == {"gamma": 0.6, "block_size": BLOCK, "min_budget": BLOCK}
    assert [tuple(x) for x in sparse["density"]] == list(record.layers[1][0].density or ())

    def half(self: Path, *_: Any, **__: Any) -> None:
        with self.open("w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ValueError, match=r"path: expected a file to write, got .*record\.json: exists already"):
        record.save(tmp_path / "record.json")
    with pytest.raises(OSError, match="No space left"):
        record.save(tmp_path / "record.json", force=True)
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]
    assert json.loads((tmp_path / "record.json").read_text()) == data
    monkeypatch.undo()
    record.save(tmp_path / "record.json", force=True)
    assert json.loads((tmp_path / "record.json").read_text()) == data
    with pytest.raises(ValueError, match="is not a regular file; name a file"):
        record.save(tmp_path, force=True)


def pass_of(mass: tuple[tuple[float, ...], ...]) -> Pass:
    ones = tuple((1,) * len(heads) for heads in mass)
    return Pass(128, 128, None, ProxyConfig(), ones, ones, mass, 1.0, 2.0)


def test_mass_that_is_not_known_is_left_out() -> None:
    """Of a sequence that is all padding there is none; JSON has null for it."""
    padded = pass_of(((0.5, 0.7), (math.nan, math.nan)))
    assert totals_of([padded, pass_of(((0.9, 0.9),))]).mass == pytest.approx((0.7, 0.8))
    assert padded.to_json()["mass"] == [[0.5, 0.7], [None, None]]
    record = Record({"class": "X"}, {"device": "CPU"})
    record._add(0, lambda: pass_of(((math.nan,),)))
    assert "nan" in str(record)


def test_layers_of_several_decoders_may_have_other_heads() -> None:
    totals = totals_of([pass_of(((0.5, 0.7),)), pass_of(((0.9, 0.9, 0.3),))])
    assert totals.mass == pytest.approx((0.7, 0.8, 0.3))
    assert totals.density == (1.0, 1.0, 1.0)


def test_without_transformers_the_remedy_is_named() -> None:
    program = """
import sys
sys.modules["transformers"] = None
import flexproxy
try:
    with flexproxy.record(None):
        pass
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120
    )
    assert 'use pip install "flexproxy[hf]"' in done.stdout, done.stderr


def test_the_name_is_lazy() -> None:
    with pytest.raises(AttributeError, match="no attribute 'recrod'"):
        flexproxy.recrod  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_times_by_events_and_no_wait(tmp_path: Path) -> None:
    """On a GPU: a recorded pass waits for it no more often than another, until the record is read."""
    from flexproxy.cli import inputs

    device = torch.device("cuda")
    model = inputs.load_decoder(str(save_tiny_model(tmp_path)), device, "flexproxy")
    configure(model, ProxyConfig(gamma=0.6, min_budget=128), when="always")
    tokens = torch.randint(2, 200, (1, 1024), device=device)

    @torch.no_grad()
    def waits() -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model(input_ids=tokens, use_cache=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(x.message) for x in told)

    waits()  # compiles
    with flexproxy.record(model):
        waits()  # likewise, where the default mask is not passed by
    alone = waits()
    with flexproxy.record(model) as record:
        assert waits() == alone
    assert len(record.layers) == 2
    for (sparse,) in record.layers.values():
        assert sparse.build_ms is not None
        assert 0 < sparse.build_ms < sparse.total_ms < 1000
