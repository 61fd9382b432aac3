"""flexproxy in transformers: caches, batches, packing, chunks, decoding, training, compilation."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import AttentionInterface

import flexproxy
from flexproxy import ProxyConfig
from flexproxy.integrations.transformers import attention as hf_attention
from flexproxy.integrations.transformers import configuration, configure
from flexproxy.integrations.transformers import masks as hf_masks
from flexproxy.sparse import kernel, rows
from flexproxy.sparse.plan import plan_attention
from tests.accuracy import skip_unless_flex_compiles
from tests.transformers_models import (
    FAMILIES,
    configure_sparse,
    interpreted,
    logits,
    make_model,
    make_tokens,
    one_after_another,
    use,
)

BLOCK = 32
EVERY_BLOCK = ProxyConfig(gamma=1.0, max_budget=2**20, min_budget=BLOCK, block_size=BLOCK)
SOME_BLOCKS = ProxyConfig(gamma=0.6, min_budget=BLOCK, block_size=BLOCK)
TOLERANCE = 1e-4  # logits are of order 1, and single precision leaves errors of order 1e-5


def model_of(family: str, device: str = "cpu", **overrides: Any) -> Any:
    if not hasattr(transformers, FAMILIES[family][0]):
        pytest.skip(f"this transformers has no {FAMILIES[family][0]}")
    model = make_model(family, **overrides).to(device)
    use(model, "flexproxy")
    return model


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


# ------------------------------------------------------------------------------------------------ registration


def test_the_import_registers_and_changes_nothing_else() -> None:
    program = """
import json
import torch, transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama
import transformers.masking_utils as masking, torch.nn.functional as F
import torch.nn.attention.flex_attention as flex
import flexproxy
def state():
    interfaces = [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)]
    modules = {(m.__name__, k): id(v) for m in (modeling_llama, masking, F, flex) for k, v in vars(m).items()}
    return interfaces, modules
before = state()
import flexproxy.integrations.transformers
after = state()
new = [sorted(set(a) - set(b)) for a, b in zip(after[0], before[0])]
kept = [all(a[k] is b[k] for k in b) for a, b in zip(after[0], before[0])]
print(json.dumps([new, kept, after[1] == before[1]]))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[["flexproxy"], ["flexproxy"]], [True, True], True]


def test_an_old_transformers_is_refused_with_the_remedy() -> None:
    program = """
import sys, types
old = types.ModuleType("transformers")
old.__version__, old.AttentionInterface = "4.52.4", object
sys.modules["transformers"] = old
import flexproxy.integrations.transformers
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=root, timeout=120
    )
    assert "expected 4.53 or later" in done.stderr, done.stderr
    assert "got 4.52.4; use pip install --upgrade" in done.stderr


def test_setting_the_attention_and_back() -> None:
    model, tokens = model_of("llama"), make_tokens(1, 300)
    configure_sparse(model, SOME_BLOCKS)
    use(model, "sdpa")
    dense = logits(model, tokens)
    use(model, "flexproxy")
    sparse = logits(model, tokens)
    assert (sparse - dense).abs().max() > 0.1
    use(model, "sdpa")
    assert torch.equal(logits(model, tokens), dense)
    use(model, "flexproxy")
    assert torch.equal(logits(model, tokens), sparse)


def test_two_models_have_their_own_settings() -> None:
    """Even where they were made with one configuration object."""
    one = model_of("llama")
    two = type(one)(one.config).eval()
    two.load_state_dict(one.state_dict())
    tokens = make_tokens(1, 300)
    configure(one, SOME_BLOCKS)
    configure(two, EVERY_BLOCK)
    sparse, dense = logits(one, tokens), logits(two, tokens)
    assert (sparse - dense).abs().max() > 0.1
    use(one, "sdpa")
    assert_close(dense, logits(one, tokens))
    assert set(configuration(one).values()) == {SOME_BLOCKS}
    assert set(configuration(two).values()) == {EVERY_BLOCK}


# ------------------------------------------------------------------------------------------------ batches


def test_a_padded_batch_gives_each_sequence_its_own_logits(device: str) -> None:
    model, tokens = model_of("llama", device), make_tokens(3, 300).to(device)
    lengths = [300, 211, 150]
    configure_sparse(model, EVERY_BLOCK)
    for side in ("left", "right"):
        padding = torch.zeros_like(tokens)
        rows = [slice(300 - n, None) if side == "left" else slice(n) for n in lengths]
        for i, row in enumerate(rows):
            padding[i, row] = 1
        positions = (padding.cumsum(1) - 1).clamp(min=0)
        batch = logits(model, tokens, attention_mask=padding, position_ids=positions)
        assert batch.isfinite().all()
        for i, row in enumerate(rows):
            assert_close(batch[i : i + 1, row], logits(model, tokens[i : i + 1, row]))


def test_padding_by_whole_blocks_keeps_the_selection(device: str) -> None:
    """Blocks then begin at the same tokens, so with a budget too a sequence has the logits that it has alone."""
    model, tokens = model_of("llama", device), make_tokens(2, 320).to(device)
    configure_sparse(model, SOME_BLOCKS)
    for row in (slice(4 * BLOCK, None), slice(201)):
        padding = torch.ones_like(tokens)
        padding[1] = 0
        padding[1, row] = 1
        positions = (padding.cumsum(1) - 1).clamp(min=0)
        batch = logits(model, tokens, attention_mask=padding, position_ids=positions)
        assert_close(batch[1:, row], logits(model, tokens[1:, row]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_packed_batch_gives_each_document_its_own_logits(family: str, device: str) -> None:
    if not hasattr(transformers.masking_utils, "find_packed_sequence_indices"):
        pytest.skip("this transformers does not find packed sequences")
    model, tokens = model_of(family, device), make_tokens(1, 500).to(device)
    configure_sparse(model, EVERY_BLOCK)
    ends = [0, 200, 340, 500]
    documents = [slice(a, b) for a, b in pairwise(ends)]
    positions = torch.cat([torch.arange(d.stop - d.start) for d in documents])[None].to(device)
    packed = logits(model, tokens, position_ids=positions)
    for d in documents:
        assert_close(packed[:, d], logits(model, tokens[:, d]))


# ------------------------------------------------------------------------------------------------ caches and chunks


def generate(model: Any, tokens: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens, and their logits ``[new, B, vocabulary]``."""
    with interpreted(tokens.device.type), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True} | arguments
        out = model.generate(tokens, return_dict_in_generate=True, output_logits=True, **arguments)
    return out.sequences, torch.stack(out.logits)


def prefill_in_chunks(model: Any, tokens: Tensor, sizes: list[int]) -> Tensor:
    takes_config = "config" in inspect.signature(transformers.DynamicCache.__init__).parameters
    cache = transformers.DynamicCache(**({"config": model.config} if takes_config else {}))
    assert sum(sizes) == tokens.shape[1]
    parts = [logits(model, part, past_key_values=cache, use_cache=True) for part in tokens.split(sizes, 1)]
    return torch.cat(parts, 1)


CACHED = ["llama", "gemma2", "gemma3", "gpt_oss"]  # without and with sliding windows, softcap, sinks


@pytest.mark.parametrize("family", CACHED)
def test_prefill_in_chunks_is_one_prefill(family: str, device: str) -> None:
    """Chunks of several blocks, of less than one, and single tokens."""
    model, tokens = model_of(family, device), make_tokens(2, 420).to(device)
    configure_sparse(model, EVERY_BLOCK)
    whole = logits(model, tokens)
    assert_close(prefill_in_chunks(model, tokens, [150, 200, 40, 1, 29]), whole)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", CACHED)
def test_generate(family: str, cache: str | None, device: str) -> None:
    """A padded batch, prefilled at once and decoded, gives the tokens of the model's own eager attention."""
    model, tokens = model_of(family, device), make_tokens(2, 300).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :45] = 0
    arguments = {"attention_mask": padding} | ({"cache_implementation": cache} if cache else {})
    configure_sparse(model, EVERY_BLOCK)
    ours, our_logits = generate(model, tokens, **arguments)
    use(model, "eager")
    theirs, their_logits = generate(model, tokens, **arguments)
    assert torch.equal(ours, theirs)
    assert_close(our_logits, their_logits)


@pytest.mark.parametrize("family", CACHED)
def test_a_prompt_of_less_than_a_block(family: str, device: str) -> None:
    """It is dense from the start, also where the cache has free places behind it."""
    model, tokens = model_of(family, device), make_tokens(2, 40).to(device)
    ours, our_logits = generate(model, tokens, cache_implementation="static")
    use(model, "eager")
    theirs, their_logits = generate(model, tokens, cache_implementation="static")
    assert torch.equal(ours, theirs)
    assert_close(our_logits, their_logits)


def test_generate_with_chunked_prefill(device: str) -> None:
    model, tokens = model_of("llama", device), make_tokens(2, 300).to(device)
    configure_sparse(model, EVERY_BLOCK)
    whole, whole_logits = generate(model, tokens)
    chunks, chunk_logits = generate(model, tokens, prefill_chunk_size=140)
    assert torch.equal(whole, chunks)
    assert_close(chunk_logits, whole_logits)


def test_chunks_compile_no_kernel_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys grow from chunk to chunk: as on a GPU, the second length brings a kernel for all. Layers share a plan."""
    traced: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        traced.append(1)
        return graph.forward

    on_a_gpu: Any = kernel.compiled_flex_attention.__wrapped__("cuda")
    compiled = torch.compile(on_a_gpu._torchdynamo_orig_callable, fullgraph=True, backend=count)
    monkeypatch.setattr(kernel, "run_compiled", compiled)
    monkeypatch.setattr(rows, "fits", lambda *_: False)  # what a CPU does instead
    model, tokens = model_of("llama"), make_tokens(1, 8 * 160)
    configure_sparse(model, SOME_BLOCKS)
    plan_attention.plans.clear()
    counts, cache = [], transformers.DynamicCache()
    for part in tokens.split(160, 1):
        with torch.no_grad():
            model(input_ids=part, past_key_values=cache, use_cache=True)
        counts.append((len(traced), len(plan_attention.plans)))
    assert counts[0] == (1, 1)
    assert [plans for _, plans in counts] == list(range(1, 9)), "one for each length of the keys"
    assert counts[-1][0] <= 3, "for as many keys as queries, for more, and for any number"
    assert counts[2][0] == counts[-1][0]


def test_a_decode_step_makes_no_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = model_of("llama"), make_tokens(1, 300)
    configure_sparse(model, SOME_BLOCKS)
    made = []

    class Counted(hf_masks.ForwardMask):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(hf_masks, "ForwardMask", Counted)
    generate(model, tokens)
    assert len(made) == 1


# ------------------------------------------------------------------------------------------------ what layers have


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dimensions(head_dim: int, device: str) -> None:
    model = model_of("llama", device, head_dim=head_dim, num_hidden_layers=1)
    tokens = make_tokens(1, 200).to(device)
    configure_sparse(model, EVERY_BLOCK)
    ours = logits(model, tokens)
    use(model, "sdpa")
    assert_close(ours, logits(model, tokens))


def test_sinks_by_the_log_sum_exp_are_sinks_among_the_scores() -> None:
    """The way of a GPU's kernel, and the dense one; a row without keys stays 0."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 30, 16), torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16)
    sinks, mask = torch.randn(4), torch.rand(2, 1, 30, 40) < 0.3
    mask[:, :, 7] = False
    plain = hf_attention._with_scores(q, k, v, mask, None, None, None)
    scores = (q @ k.repeat_interleave(2, 1).mT / 4).masked_fill(~mask, -torch.inf)
    ours = hf_attention._with_sinks(plain, scores.logsumexp(-1), sinks)
    expected = torch.cat([scores, sinks[:, None, None].expand(2, 4, 30, 1)], -1).softmax(-1)[..., :40]
    expected = expected @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(hf_attention._with_scores(q, k, v, mask, None, None, sinks), expected)
    assert not ours[:, :, 7].any()


def test_a_window_that_the_least_budget_covers_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is nothing to estimate in the layers that have it, and they alone."""
    model, tokens = model_of("gemma3"), make_tokens(1, 600)  # a window of 100 in layer 0
    estimated = []

    def recorded(*arguments: Any) -> Any:
        plan = plan_attention(*arguments)
        estimated.append(plan.dense is None)
        return plan

    monkeypatch.setattr(hf_attention, "plan_attention", recorded)
    monkeypatch.setattr(hf_attention, "_MAX_TOKEN_PAIRS", 0)
    # Blocks of 32 queries and a window of 100 reach over 131 tokens, so over 6 blocks at most.
    for min_budget, expected in ((5 * BLOCK, [True, True]), (6 * BLOCK, [False, True])):
        configure(model, ProxyConfig(gamma=0.6, min_budget=min_budget, block_size=BLOCK))
        estimated.clear()
        dense = logits(model, tokens)
        assert estimated == expected
    configure_sparse(model, EVERY_BLOCK)
    every = logits(model, tokens)
    configure(model, {0: ProxyConfig(gamma=0.6, min_budget=6 * BLOCK, block_size=BLOCK)})
    assert_close(logits(model, tokens), every)
    assert (dense - every).abs().max() > 1e-3


def test_latent_attention(device: str) -> None:
    """MLA: keys and values have head dimensions of their own."""
    settings: dict[str, Any] = {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    }
    llama = make_model("llama").config.to_dict()
    base = {k: llama[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**base, num_attention_heads=4, initializer_range=0.15, **settings)
    model: Any = one_after_another(transformers.DeepseekV3ForCausalLM(config).eval().to(device))
    tokens = make_tokens(1, 300).to(device)
    use(model, "eager")
    theirs = logits(model, tokens)
    use(model, "flexproxy")
    configure_sparse(model, EVERY_BLOCK)
    assert_close(logits(model, tokens), theirs)
    configure_sparse(model, SOME_BLOCKS)
    assert (logits(model, tokens) - theirs).abs().max() > 0.05


def test_recorded_selections() -> None:
    """Those of the layers that were sparse; afterwards the model is as it was."""
    model, tokens = model_of("gemma3"), make_tokens(1, 300)
    configure(model, {0: EVERY_BLOCK, 1: SOME_BLOCKS})
    expected = logits(model, tokens)
    with flexproxy.record(model, selections=True) as record:
        assert torch.equal(logits(model, tokens), expected)
        generate(model, tokens)
    assert sorted(record.selections) == [0, 1]
    assert record.selections[0].density().min() == 1
    assert 0.1 < record.selections[1].density().mean() < 0.9
    configure(model, ProxyConfig(min_budget=300))
    with flexproxy.record(model, selections=True) as record:
        logits(model, tokens)
    assert record.layers
    assert not record.selections
    assert not any("flexproxy_observers" in vars(module) for module in model.modules())


# ------------------------------------------------------------------------------------------------ what is refused


def test_an_encoder_decoder_runs_dense_where_it_is_not_causal() -> None:
    """Its encoder and its cross-attention are told of once; its decoder is sparse."""
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=400,
        init_std=0.3,
    )
    torch.manual_seed(0)
    model: Any = transformers.BartForConditionalGeneration(config).eval()
    source, target = make_tokens(2, 300), make_tokens(2, 200, seed=1)
    padding = torch.ones_like(source)
    padding[0, 250:] = 0
    inputs = {"attention_mask": padding, "decoder_input_ids": target}
    use(model, "sdpa")
    theirs = logits(model, source, **inputs)
    use(model, "flexproxy")
    configure_sparse(model, EVERY_BLOCK)
    hf_attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"flexproxy: encoders, cross-attention .* run dense") as told:
        ours = [logits(model, source, **inputs) for _ in range(2)]
    assert_close(ours[0], theirs)
    assert len([w for w in told if str(w.message).startswith("flexproxy: encoders")]) == 1
    if not hasattr(transformers.models.bart.modeling_bart, "create_causal_mask"):
        pytest.skip("this transformers makes the masks of the decoder inside of the model, by tokens")
    configure_sparse(model, SOME_BLOCKS)
    assert (logits(model, source, **inputs) - theirs).abs().max() > 1e-3


def test_a_mask_by_tokens_runs_dense_and_is_told_of() -> None:
    model, tokens = model_of("llama"), make_tokens(1, 300)
    configure_sparse(model, SOME_BLOCKS)
    mask = torch.ones(1, 1, 300, 300, dtype=torch.bool).tril()
    use(model, "sdpa")
    theirs = logits(model, tokens, attention_mask=mask)
    use(model, "flexproxy")
    hf_attention._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"flexproxy: a causal layer got a mask by tokens .* runs dense"):
        assert torch.equal(logits(model, tokens, attention_mask=mask), theirs)


def test_a_block_mask_of_the_caller() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model, tokens = model_of("llama"), make_tokens(1, 300)
    configure_sparse(model, EVERY_BLOCK)
    theirs = logits(model, tokens)
    own = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 300, 300, device="cpu", BLOCK_SIZE=BLOCK)
    assert_close(logits(model, tokens, attention_mask=own), theirs)
    wrong = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 300, 300, device="cpu", BLOCK_SIZE=64)
    with pytest.raises(ValueError, match="block_mask: expected blocks of 32 x 32 as in config, got 64 x 64"):
        logits(model, tokens, attention_mask=wrong)


def test_attention_weights_are_refused() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="output_attentions"):
        logits(model, make_tokens(1, 300), output_attentions=True)


def test_dropout_is_refused() -> None:
    model = model_of("llama", attention_dropout=0.1).train()
    configure_sparse(model, SOME_BLOCKS)
    with pytest.raises(ValueError, match=r"dropout: expected 0\.0, .* got 0\.1; use model\.eval"):
        logits(model, make_tokens(1, 300))


def test_scores_that_are_not_supported_are_refused() -> None:
    model = model_of("llama")
    configure_sparse(model, SOME_BLOCKS)
    with pytest.raises(ValueError, match="position_bias: expected None"):
        logits(model, make_tokens(1, 300), position_bias=torch.zeros(1, 4, 300, 300))


def test_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within ``context_parallel`` torch has replaced SDPA, and each rank sees a piece of the sequence."""

    def inner_fn(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    inner_fn.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", inner_fn)
    with pytest.raises(ValueError, match="context_parallel: expected whole sequences, got pieces"):
        logits(model_of("llama"), make_tokens(1, 300))


# ------------------------------------------------------------------------------------------------ training, compilation


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family: str, checkpointing: bool, device: str) -> None:
    """Gradients are those of eager attention, with and without gradient checkpointing."""
    model, tokens = model_of(family, device), make_tokens(2, 200).to(device)
    padding = torch.ones_like(tokens)
    padding[0, 160:] = 0
    labels = tokens.masked_fill(padding == 0, -100)
    configure_sparse(model, EVERY_BLOCK)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def gradients(name: str) -> dict[str, Tensor]:
        use(model, name)
        model.zero_grad()
        with interpreted(device):
            model(input_ids=tokens, attention_mask=padding, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    theirs, ours = gradients("eager"), gradients("flexproxy")
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_training_under_a_budget(device: str) -> None:
    """Checkpointing selects the same blocks again, so it changes no gradient."""
    model, tokens = model_of("llama", device).train(), make_tokens(1, 200).to(device)
    configure_sparse(model, SOME_BLOCKS)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with interpreted(device):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that users run, not as interpreted: a padded prefill under a budget, and dense under its mask."""
    monkeypatch.setattr(hf_attention, "_MAX_TOKEN_PAIRS", 0)
    skip_unless_flex_compiles(device)
    model, tokens = model_of("llama", device), make_tokens(2, 320).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :50] = 0
    real = padding.bool()
    for config in (SOME_BLOCKS, ProxyConfig()):
        configure(model, config)
        expected = logits(model, tokens, attention_mask=padding)
        with torch.no_grad():
            out = model(input_ids=tokens, attention_mask=padding, use_cache=True)
        assert_close(out.logits[real], expected[real])


@pytest.mark.slow
def test_a_compiled_model(device: str) -> None:
    """One graph for the prefill and one for a decode step."""
    skip_unless_flex_compiles(device)
    model, tokens = model_of("llama", device), make_tokens(1, 257).to(device)
    configure_sparse(model, SOME_BLOCKS)
    prompt, new = tokens[:, :256], tokens[:, 256:]
    expected = prefill_in_chunks(model, tokens, [256, 1])
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=False if device == "cpu" else None)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        assert_close(compiled(input_ids=prompt, past_key_values=cache).logits, expected[:, :256])
        assert_close(compiled(input_ids=new, past_key_values=cache).logits, expected[:, 256:])


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
def test_a_traced_model_evaluates_what_it_cannot_look_into(padded: bool, device: str) -> None:
    """In a trace transformers packs every sequence, whose mask is a closure."""
    model, tokens = model_of("gemma3", device), make_tokens(2, 256).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :60] = 0
    inputs = {"attention_mask": padding} if padded else {}
    configure_sparse(model, EVERY_BLOCK)
    expected = logits(model, tokens, **inputs)
    traced: Any = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        out = traced(input_ids=tokens, use_cache=False, **inputs).logits
    real = padding.bool() if padded else torch.ones_like(padding).bool()
    assert_close(out[real], expected[real])


def test_registered_functions_are_those_of_the_package() -> None:
    assert AttentionInterface()["flexproxy"] is hf_attention.attention_forward
