"""Greedy and beam search equal `transformers.generate` token for token, with random weights of T5, Switch and Mixtral."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.bench.generate import switch_parameters
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.settings import from_config

pytestmark = pytest.mark.long
SIZES = dict(d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, dtype="float32", scan=False)
ROWS = 512


def numbers(model):
    """The state, with random numbers large enough that the answers are of some variety."""
    import torch

    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.25)
    return {name: leaf.detach().numpy() for name, leaf in model.state_dict().items()}


def settings(model, moe, objective="span_corruption"):
    data = dict(vocab_size=ROWS - 100, input_length=16, objective=objective)
    return from_config(dict(model=SIZES | model, moe=dict(jitter=0.0) | moe, data=data))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=ROWS, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, num_decoder_layers=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    own = settings(dict(activation="geglu", tie_embeddings=False), dict(num_experts=1))
    return model, own, switch_parameters(numbers(model), own)


def switch():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    config = SwitchTransformersConfig(
        vocab_size=ROWS, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4, num_decoder_layers=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=64,
        router_jitter_noise=0.0, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config).eval()
    own = settings(dict(activation="relu"), dict(num_experts=4))
    return model, own, switch_parameters(numbers(model), own)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-5, rope_theta=1e4,
        sliding_window=None, tie_word_embeddings=False, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    own = settings(
        dict(
            stacks="decoder_only", activation="swiglu", positions="rotary", attention_scale=0.0, num_kv_heads=2,
            norm_eps=1e-5, tie_embeddings=False,
        ),
        dict(num_experts=4, every=1, router="top_k", choices=2),
        "causal_lm",
    )  # fmt: skip
    state = numbers(model)

    def block(name):
        attention = {}
        for own_name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = state[f"{name}.self_attn.{letter}_proj.weight"].T
            attention[own_name] = kernel.reshape(32, -1, 8)
        attention["out"] = state[f"{name}.self_attn.o_proj.weight"].T.reshape(4, 8, 32)
        gate, up = np.split(state[f"{name}.mlp.experts.gate_up_proj"].swapaxes(1, 2), 2, axis=-1)
        down = state[f"{name}.mlp.experts.down_proj"].swapaxes(1, 2)
        return {
            "self": attention,
            "self_norm": {"scale": state[f"{name}.input_layernorm.weight"]},
            "ff_norm": {"scale": state[f"{name}.post_attention_layernorm.weight"]},
            "moe": {
                "router": state[f"{name}.mlp.gate.weight"].T,
                "experts": {"wi_gate": gate, "wi": up, "wo": down},
            },
        }

    decoder = {f"blocks_{n}": {"block_0": block(f"model.layers.{n}")} for n in range(4)}
    decoder["norm"] = {"scale": state["model.norm.weight"]}
    params = {"embedding": state["model.embed_tokens.weight"], "output": state["lm_head.weight"]}
    return model, own, params | {"decoder": decoder}


@pytest.mark.parametrize("make", [t5, switch, mixtral])
def test_greedy_and_beams_give_the_same_tokens(make):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.18")
    model, own, params = make()
    params = jax.tree.map(np.asarray, params)
    prompts = np.random.default_rng(3).integers(3, ROWS, (4, 9))
    model.generation_config.eos_token_id = None

    def theirs(**options):
        with torch.no_grad():
            found = model.generate(torch.tensor(prompts), max_new_tokens=12, do_sample=False, **options)
        return found[:, 1:] if "encoder" in own.stacks else found[:, prompts.shape[1] :]

    answers = Generator(own, params, 12, Choosing(stop_ids=()))(prompts)
    assert [answer.ids for answer in answers] == theirs().tolist()
    stop = answers[0].ids[5]  # with a token that ends sequences, at different places
    for penalty in (1.0, 0.0):
        model.generation_config.eos_token_id = stop
        search = Generator(own, params, 12, Choosing(stop_ids=(stop,)), beams=3, length_penalty=penalty)
        wanted = theirs(num_beams=3, length_penalty=penalty, early_stopping=False).tolist()
        for answer, ids in zip(search(prompts), wanted, strict=True):
            assert answer.ids == ids[: len(answer.ids)]
            assert set(ids[len(answer.ids) :]) <= {0, stop}


def test_the_same_weights_in_bfloat16_give_nearly_the_same_scores():
    pytest.importorskip("transformers", minversion="5.18")
    _, own, params = switch()
    params = jax.tree.map(np.asarray, params)
    prompts = np.random.default_rng(3).integers(3, ROWS, (2, 9))
    half = dataclasses.replace(own, model=dataclasses.replace(own.model, dtype="bfloat16"))
    exact, rounded = (Generator(of, params, 1, Choosing(stop_ids=()))(prompts) for of in (own, half))
    np.testing.assert_allclose([a.score for a in exact], [a.score for a in rounded], atol=0.3)
