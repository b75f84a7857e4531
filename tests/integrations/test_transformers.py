"""Models of transformers with nearfar's attention against eager attention and against dense formulas with eager's mask."""

import copy
import subprocess
import sys

import pytest
import torch
from harness import DEVICE

import nearfar as nf

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask  # noqa: E402
from transformers.models.llama.modeling_llama import repeat_kv  # noqa: E402

pytestmark = pytest.mark.full

nf.integrations.transformers.register()

SIZES = dict(
    vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=4),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, rope_parameters={"rope_type": "default"}
    ),
}
BACKENDS = ("reference", "triton") if DEVICE == "cpu" else ("auto",)
# The interpreter takes seconds a model: of kinds that differ little it gets one, and the others in `make test-full`.
IMPLEMENTATIONS = ("nearfar_softmax", "nearfar_krause", "nearfar_affine")
KINDS = [
    pytest.param(kind, backend, marks=[pytest.mark.full] if backend == "triton" and kind in ("llama", "qwen3") else [])
    for kind in CONFIGS
    for backend in BACKENDS
]
SIDES = ("none", "left", "right")
LENGTH = 11


class Scales(torch.nn.Module):
    """alpha and beta of "nearfar_affine"."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(SIZES["head_dim"], 2)

    def forward(self, query):
        return self.proj(query).sigmoid().unbind(-1)


def model_of(kind, implementation, **nearfar):
    """A model with the weights of its kind: of one seed, sinks that matter included."""
    config = CONFIGS[kind]()
    if nearfar:
        config.nearfar = nearfar
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(DEVICE)
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer.self_attn, "sinks"):
            layer.self_attn.sinks.data = torch.linspace(-1, 1, 4, device=DEVICE)
        if implementation.endswith("affine"):
            torch.manual_seed(i)
            layer.self_attn.nearfar_scales = Scales().to(DEVICE)
    assert model.config._attn_implementation == implementation
    return model


def batch(side="none", rows=3):
    """Token ids (rows, LENGTH) and their padding mask: the first row lacks 4 tokens, the second 1, the others none."""
    ids = torch.randint(1, 50, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, missing in zip(mask, (4, 1), strict=False):
        if side == "left":
            row[:missing] = 0
        elif side == "right":
            row[-missing:] = 0
    return {"input_ids": (ids * mask).to(DEVICE), "attention_mask": mask.to(DEVICE)}


def run(model, inputs):
    """Logits at the tokens that are not padding, and the gradients of a loss over them."""
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    valid = inputs["attention_mask"].bool() if inputs.get("attention_mask") is not None else torch.ones_like(logits[..., 0] > 0)
    logits = logits[valid]
    logits.float().log_softmax(-1)[:, 7].mean().backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, rtol=1e-5, atol=2e-6):
    (logits, grads), (other_logits, other_grads) = first, second
    torch.testing.assert_close(logits, other_logits, rtol=rtol, atol=atol)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind, backend", KINDS)
def test_forward_and_backward(kind, backend, side):
    inputs = batch(side)
    got = run(model_of(kind, "nearfar_softmax", backend=backend), inputs)
    assert_same(got, run(model_of(kind, "eager"), inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_half_precision(kind, backend):
    """Against eager attention in float32, nearfar in float16 is as close as eager in float16, within a factor of 2."""
    inputs = batch("left")
    exact = run(model_of(kind, "eager"), inputs)[0]
    plain, got = (
        (run(model.half(), inputs)[0].float() - exact).norm()
        for model in (model_of(kind, "eager"), model_of(kind, "nearfar_softmax", backend=backend))
    )
    assert 0 < got <= 2 * plain


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(implementation, side):
    """The tokens of a padded row are those of the row alone, and what stands at padding does not matter."""
    model = model_of("mistral", implementation, sigma=2.0)
    inputs = batch(side)
    logits = model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    for i in range(2):
        alone = inputs["input_ids"][i, mask[i]][None]
        positions = mask[i].nonzero().T  # without position_ids a left-padded model counts padding too
        torch.testing.assert_close(logits[i, mask[i]][None], model(alone, position_ids=positions).logits, rtol=1e-5, atol=2e-6)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(~mask, 3)
    assert torch.equal(model(**inputs).logits[mask], logits[mask])


POSITIONS = [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]
ENDS = [0, 5, 7, 11]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_packed_by_position_ids(kind, backend):
    """Two rows, each packed; the second has one sequence."""
    positions = torch.tensor([POSITIONS, list(range(LENGTH))], device=DEVICE)
    inputs = {"input_ids": batch(rows=2)["input_ids"], "position_ids": positions}
    got = run(model_of(kind, "nearfar_softmax", backend=backend), inputs)
    assert_same(got, run(model_of(kind, "eager"), inputs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_by_cu_seq_lens(implementation):
    """Of transformers' own collator, against every sequence alone."""
    model = model_of("mistral", implementation, sigma=2.0)
    ids = batch(rows=1)["input_ids"]
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collate([{"input_ids": ids[0, a:b].tolist()} for a, b in zip(ENDS, ENDS[1:], strict=False)])
    assert inputs["cu_seq_lens_q"].tolist() == ENDS and torch.equal(inputs["input_ids"], ids.cpu())
    inputs = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    got = model(**inputs, use_cache=False).logits
    alone = [model(ids[:, a:b]).logits for a, b in zip(ENDS, ENDS[1:], strict=False)]
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=1e-5, atol=2e-6)


CACHES = ["dynamic"] + ["static"] * (DEVICE == "cpu")  # transformers compiles decoding with a static cache on a GPU


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_generate(kind, side, cache):
    """Tokens and their logits, past the sliding window."""
    options = dict(max_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True)
    eager, own = (
        model_of(kind, name).eval().generate(**batch(side), **options, cache_implementation=cache)
        for name in ("eager", "nearfar_softmax")
    )
    assert torch.equal(own.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(own.logits), torch.stack(eager.logits), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_several_tokens_after_a_cache(kind, implementation):
    """A prompt in parts of 5, 4 and 2 tokens with padding on the left gives what the whole prompt gives."""
    model = model_of(kind, implementation, sigma=2.0).eval()
    inputs = batch("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, logits = None, []
    for start, end in ((0, 5), (5, 9), (9, 11)):
        o = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = o.past_key_values
        logits.append(o.logits)
    valid = mask.bool()
    torch.testing.assert_close(torch.cat(logits, 1)[valid], model(**inputs).logits[valid], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_beam_search(kind):
    """It reorders the cache, and the rows of the padding mask with it."""
    options = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    own, eager = (model_of(kind, name).eval().generate(**batch("left"), **options) for name in ("nearfar_softmax", "eager"))
    assert torch.equal(own, eager)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, implementation):
    model, inputs = model_of("mistral", implementation, sigma=2.0).train(), batch("left")
    expected = run(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_same(run(model, inputs), expected, rtol=0, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["none", "left"])
def test_compiled_model(side, implementation):
    """With a graph break where the mask is made."""
    torch._dynamo.reset()
    model, inputs = model_of("mistral", implementation, sigma=2.0), batch(side)
    expected = run(model, inputs)
    assert_same(run_compiled(model, inputs), expected)


def run_compiled(model, inputs):
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager")
    return run(compiled, inputs)


@pytest.mark.full
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_layers_have_no_graph_break(implementation):
    torch._dynamo.reset()
    model, inputs = model_of("mistral", implementation, sigma=2.0), batch("left")
    expected = run(model, inputs)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(run(model, inputs), expected)


# Dense formulas of the other operators, with the mask that transformers makes for eager attention.


def dense(weights):
    """An attention function with weights(module, query, key, mask) -> (B, Hq, N, M)."""

    def attention(module, query, key, value, attention_mask, **_):
        key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        return (weights(module, query, key, attention_mask == 0) @ value).transpose(1, 2).contiguous(), None

    return attention


def krause_weights(module, query, key, seen):
    """Window of 3 keys and the 2 nearest of them."""
    distances = (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)
    queries, keys = distances.shape[2:]
    apart = torch.arange(keys - queries, keys, device=query.device)[:, None] - torch.arange(keys, device=query.device)
    sigma = torch.as_tensor(getattr(module, "nearfar_sigma", 2.0), device=query.device).reshape(-1, 1, 1)
    scores = (-distances / (2 * sigma**2)).masked_fill(~(seen & (apart < 3)), float("-inf"))
    kept = scores.topk(min(2, keys), -1).indices
    scores = scores + torch.full_like(scores, float("-inf")).scatter(-1, kept, 0.0)
    return scores.softmax(-1).nan_to_num(0.0)


def affine_weights(module, query, key, seen):
    alpha, beta = module.nearfar_scales(query)
    scores = (query @ key.mT * module.scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    if hasattr(module, "sinks"):
        scores = torch.cat((scores, module.sinks.view(-1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)), -1)
    weights = scores.softmax(-1)[..., : seen.shape[-1]]
    return alpha[..., None] * weights + beta[..., None] * seen


for name, weights in (("dense_krause", krause_weights), ("dense_affine", affine_weights)):
    AttentionInterface.register(name, dense(weights))
    AttentionMaskInterface.register(name, eager_mask)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind, backend", [case for case in KINDS if case.values[0] in ("llama", "mistral")])
def test_krause(kind, backend, side):
    """Window and top_k of config.nearfar; sigma a parameter of the attention modules, with its gradient."""
    models = [model_of(kind, "nearfar_krause", window=3, top_k=2, backend=backend), model_of(kind, "dense_krause")]
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.nearfar_sigma = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 4.0], device=DEVICE))
    first, second = (run(model, batch(side)) for model in models)
    assert any("nearfar_sigma" in name and grad.abs().max() > 0 for name, grad in first[1].items())
    assert_same(first, second, atol=5e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("operator", ["krause", "affine"])
def test_others_generate(operator, cache, kind):
    """The dense formulas take a dynamic cache, which has no empty slots after the last query."""
    options = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    first, second = (
        model_of(kind, name, sigma=2.0, window=3, top_k=2)
        .eval().generate(**batch("left"), **options, cache_implementation=own_cache)
        for name, own_cache in ((f"nearfar_{operator}", cache), (f"dense_{operator}", "dynamic"))
    )
    assert torch.equal(first.sequences, second.sequences)
    torch.testing.assert_close(torch.stack(first.logits), torch.stack(second.logits), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind, backend", [case for case in KINDS if case.values[0] in ("mistral", "gpt_oss")])
def test_affine(kind, backend, side):
    models = [model_of(kind, "nearfar_affine", backend=backend), model_of(kind, "dense_affine")]
    first, second = (run(model, batch(side)) for model in models)
    assert all(grad.abs().max() > 0 for name, grad in first[1].items() if "nearfar_scales" in name)
    assert_same(first, second, atol=5e-6)


def test_arguments_of_register():
    """They hold for models without config.nearfar, until the next call."""
    inputs = batch("left")
    try:
        nf.integrations.transformers.register(sigma=0.7, window=3)
        got = model_of("llama", "nearfar_krause")(**inputs).logits
        other = model_of("llama", "nearfar_krause", sigma=1.0)(**inputs).logits
    finally:
        nf.integrations.transformers.register()
    assert torch.equal(got, model_of("llama", "nearfar_krause", sigma=0.7, window=3)(**inputs).logits)
    assert torch.equal(other, model_of("llama", "nearfar_krause", sigma=1.0, window=3)(**inputs).logits)
    assert not torch.equal(got, other)


def test_save_and_load(tmp_path):
    model = model_of("llama", "nearfar_krause", sigma=2.0, top_k=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="nearfar_krause").to(DEVICE)
    assert loaded.config.nearfar == {"sigma": 2.0, "top_k": 3}
    inputs = batch("right")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.set_attn_implementation("nearfar_softmax")
    assert torch.equal(loaded(**inputs).logits, model_of("llama", "nearfar_softmax")(**inputs).logits)


@pytest.mark.parametrize("pair", [
    ("nearfar_softmax", "eager"), ("nearfar_krause", "dense_krause"), ("nearfar_affine", "dense_affine"),
], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_a_width_that_kernels_do_not_take(pair, backend, monkeypatch):
    monkeypatch.setitem(SIZES, "head_dim", 10)
    inputs, settings = batch("left"), dict(sigma=2.0, window=3, top_k=2, backend=backend)
    assert_same(*(run(model_of("llama", name, **settings), inputs) for name in pair), atol=5e-6)


def test_encoder_with_padding():
    """Bidirectional attention keeps every query, since it may be cross-attention."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    outputs = []
    for name in ("eager", "nearfar_softmax"):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation=name).to(DEVICE).eval()
        outputs.append(model(**batch("right")).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=5e-6)


def gap():
    inputs = batch()
    inputs["attention_mask"][0, 4] = 0
    return inputs


def test_padding_between_tokens():
    """Exact without a window, refused with one. Tokens after a prompt with padding on its right are such a case."""
    assert_same(*(run(model_of("llama", name), gap()) for name in ("nearfar_softmax", "eager")))
    prompt = batch("right")
    mask = torch.nn.functional.pad(prompt["attention_mask"], (0, 2), value=1)
    logits = []
    for name in ("nearfar_softmax", "eager"):
        model = model_of("llama", name).eval()
        cache = model(**prompt, use_cache=True).past_key_values
        logits.append(model(prompt["input_ids"][:, :2], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-6)
    with pytest.raises(NotImplementedError, match="cannot count a window"):
        model_of("mistral", "nearfar_softmax")(**gap())
    with pytest.raises(NotImplementedError, match="cannot count a window"):
        model_of("llama", "nearfar_krause", sigma=2.0, window=3)(**gap())


def ready_mask():
    return {**batch(), "attention_mask": torch.zeros(3, 1, LENGTH, LENGTH, device=DEVICE)}


def with_weights():
    return {**batch(), "output_attentions": True}


def packed_by(ends, key_ends=None, side="none", rows=1):
    """A function that makes the inputs."""
    ends, key_ends = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (ends, key_ends or ends))
    return lambda: {**batch(side, rows), "cu_seq_lens_q": ends, "cu_seq_lens_k": key_ends}


@pytest.mark.parametrize("kind, implementation, change, inputs, error, message", [
    ("llama", "nearfar_softmax", {}, ready_mask, NotImplementedError, "no arbitrary mask"),
    ("llama", "nearfar_softmax", {"attention_dropout": 0.1}, batch, NotImplementedError, "no dropout, got 0.1"),
    ("llama", "nearfar_softmax", {"nearfar": {"sigma": 1.0, "size": 3}}, batch, ValueError, "config.nearfar takes.*got size"),
    ("llama", "nearfar_softmax", {"nearfar": 3}, batch, TypeError, "config.nearfar must be a dict"),
    ("llama", "nearfar_softmax", {}, with_weights, NotImplementedError, "does not support output_attentions"),
    ("llama", "nearfar_softmax", {}, packed_by([0, 11], side="left"), NotImplementedError, "cu_seq_lens_q or padding"),
    ("llama", "nearfar_softmax", {}, packed_by([0, 11, 22], rows=2), NotImplementedError, "cu_seq_lens_q in a batch of 1"),
    ("llama", "nearfar_softmax", {}, packed_by([0, 4, 11], [0, 5, 11]), NotImplementedError, "cu_seq_lens_k must equal"),
    ("llama", "nearfar_krause", {}, batch, ValueError, "nearfar_krause needs a bandwidth"),
    ("llama", "nearfar_krause", {"nearfar": {"sigma": 1.0, "window": 0}}, batch, ValueError, "window must be at least 1"),
    ("gpt_oss", "nearfar_krause", {"nearfar": {"sigma": 1.0}}, batch, NotImplementedError, "no attention sink"),
    ("llama", "nearfar_affine", {}, batch, ValueError, "nearfar_affine needs alpha and beta"),
])
def test_what_cannot_be_computed_is_refused(kind, implementation, change, inputs, error, message):
    model = model_of(kind, implementation).train()
    for name, value in change.items():
        setattr(model.config, name, value)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = model.config.attention_dropout
        layer.self_attn._modules.pop("nearfar_scales", None)
    with pytest.raises(error, match=message):
        model(**inputs())


@pytest.mark.parametrize("option", nf.integrations.transformers.REFUSED)
def test_options_are_refused_by_name(option):
    attention = AttentionInterface()["nearfar_softmax"]
    q = torch.randn(1, 2, 4, 16)
    attention(torch.nn.Identity(), q, q, q, None, **{option: None})
    with pytest.raises(NotImplementedError, match=f"does not support {option}"):
        attention(torch.nn.Identity(), q, q, q, None, **{option: torch.ones(1)})


def test_softcap_of_a_model():
    config = transformers.Gemma2Config(**SIZES, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="nearfar_softmax").to(DEVICE)
    with pytest.raises(NotImplementedError, match="does not support softcap"):
        model.eval()(**batch())


def test_masks_that_are_no_window():
    """Chunks, blocks and functions of the user's: what transformers adds to a causal mask."""
    from transformers import masking_utils as masks

    own = ALL_MASK_ATTENTION_FUNCTIONS["nearfar_softmax"]
    sizes = dict(batch_size=1, q_length=4, kv_length=4)
    causal, ids = masks.causal_mask_function, torch.zeros(1, 4, dtype=torch.long)
    for function in (
        masks.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long)),
        masks.or_masks(causal, masks.blockwise_overlay(ids)),
        masks.and_masks(causal, lambda b, h, q, k: q != k),
        lambda b, h, q, k: q >= k,
    ):
        with pytest.raises(NotImplementedError, match="no operator for the mask"):
            own(**sizes, mask_function=function)
    assert own(**sizes, mask_function=masks.sliding_window_causal_mask_function(3)).window == (2, 0)
    assert own(**sizes, mask_function=masks.sliding_window_bidirectional_mask_function(3)).window == (3, 3)


def test_a_mask_of_other_sizes():
    attention = AttentionInterface()["nearfar_softmax"]
    own = ALL_MASK_ATTENTION_FUNCTIONS["nearfar_softmax"]
    from transformers.masking_utils import causal_mask_function

    mask = own(batch_size=1, q_length=4, kv_length=4, mask_function=causal_mask_function)
    q = torch.randn(1, 2, 5, 16)
    with pytest.raises(ValueError, match=r"the mask is for .* \(1, 4, 4\), the call has \(1, 5, 5\)"):
        attention(torch.nn.Identity(), q, q, q, mask)


def test_importing_nearfar_imports_no_transformers():
    code = "import sys, nearfar; nearfar.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_register_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs a recent transformers 5"):
        nf.integrations.transformers.register()
