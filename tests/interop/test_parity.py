"""Equal to `transformers`: logits, gradients, tokens and files, of random weights in float32. Needs the extra ``hf``."""

import contextlib
import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from test_run import TINY

from experiments import convert as command
from switchmoe.data import sources as texts
from switchmoe.data.vocabulary import load_vocabulary
from switchmoe.inference.decoding import Choosing
from switchmoe.inference.generation import Generator
from switchmoe.interop import check, convert, run_files, sources, tables, tokenizer
from switchmoe.interop.tables import LINEAR
from switchmoe.model.transformer import Transformer
from switchmoe.runs import trained
from switchmoe.settings import DataSettings

pytestmark = pytest.mark.long
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.18")

T5 = dict(
    vocab_size=333, d_model=32, d_ff=48, d_kv=8, num_heads=3, num_layers=4, num_decoder_layers=6, dropout_rate=0.0,
    pad_token_id=0, decoder_start_token_id=0, eos_token_id=1,
)  # fmt: skip
SWITCH = T5 | dict(
    router_jitter_noise=0.0, num_sparse_encoder_layers=2, num_sparse_decoder_layers=3, num_experts=8
)
DECODER = dict(
    vocab_size=333, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, pad_token_id=None,
    bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)  # fmt: skip
QWEN = DECODER | dict(intermediate_size=64, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3)
CASES = {  # name: (class, fields)
    "switch": ("SwitchTransformers", SWITCH | dict(expert_capacity=64)),
    "switch over capacity": (
        "SwitchTransformers",
        SWITCH | dict(expert_capacity=2, num_decoder_layers=4, num_sparse_decoder_layers=2),
    ),
    "switch, every block, untied, 3": (
        "SwitchTransformers",
        SWITCH | dict(num_sparse_encoder_layers=4, num_sparse_decoder_layers=6, num_experts=3, tie_word_embeddings=False),
    ),
    "switch, every fourth, one in the decoder": (
        "SwitchTransformers",
        SWITCH | dict(num_layers=8, num_sparse_encoder_layers=2, num_sparse_decoder_layers=0),
    ),
    "switch, one expert": ("SwitchTransformers", SWITCH | dict(num_experts=1, expert_capacity=5)),
    "switch, seven blocks and ten, every second and third": (
        "SwitchTransformers",
        SWITCH | dict(num_layers=7, num_sparse_encoder_layers=3, num_decoder_layers=10, num_sparse_decoder_layers=3),
    ),
    "switch, 64": ("SwitchTransformers", SWITCH | dict(num_experts=64)),
    "t5, relu, tied": ("T5", T5 | dict(feed_forward_proj="relu")),
    "t5, gated, untied": ("T5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mt5": ("MT5", T5),
    "mt5, gated, untied": ("MT5", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mixtral": ("Mixtral", DECODER | dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, head_dim=16)),
    "olmoe": ("Olmoe", DECODER | dict(intermediate_size=48, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)),
    "olmoe, renormalised": (
        "Olmoe",
        DECODER | dict(intermediate_size=48, num_experts=64, num_experts_per_tok=8, norm_topk_prob=True),
    ),
    "mixtral, one choice": ("Mixtral", DECODER | dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=1)),
    "olmoe, one choice, renormalised": (
        "Olmoe",
        DECODER | dict(intermediate_size=48, num_experts=8, num_experts_per_tok=1, norm_topk_prob=True),
    ),
    "qwen2": ("Qwen2Moe", QWEN | dict(shared_expert_intermediate_size=48, norm_topk_prob=False)),
    "qwen2, every other, renormalised": (
        "Qwen2Moe",
        QWEN | dict(shared_expert_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=2, qkv_bias=False),
    ),
    "qwen3": ("Qwen3Moe", QWEN | dict(head_dim=16, norm_topk_prob=True)),
    "qwen3, dense first": ("Qwen3Moe", QWEN | dict(head_dim=16, norm_topk_prob=False, mlp_only_layers=[0, 1])),
    "qwen3, one choice": ("Qwen3Moe", QWEN | dict(head_dim=16, num_experts_per_tok=1, norm_topk_prob=False)),
    "qwen3, tied": ("Qwen3Moe", QWEN | dict(head_dim=8, tie_word_embeddings=True)),
}  # fmt: skip
ONE_OF_EACH = [
    "switch over capacity",
    "t5, gated, untied",
    "mt5",
    "mixtral",
    "olmoe",
    "qwen2",
    "qwen3, dense first",
]


def model_of(case):
    """Their model, with random numbers large enough that something hangs on each."""
    kind, fields = CASES[case]
    decoder = "hidden_size" in fields
    cls = getattr(transformers, f"{kind}{'ForCausalLM' if decoder else 'ForConditionalGeneration'}")
    # With 1 two experts of a token are 2e-6 apart there: the sums' order alone would send it to one or the other.
    torch.manual_seed(2 if case == "switch, every fourth, one in the decoder" else 1)
    model = cls(cls.config_class(**fields))
    if not decoder:
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
        if fields.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(torch.empty(333, 32))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model.eval()


@contextlib.contextmanager
def quiet(_):
    yield


def converted(model, place, **save):
    model.save_pretrained(place / "theirs", **save)
    convert.into_run(convert.recognised(place / "theirs"), place / "run", "", quiet)
    source = trained.find(str(place / "run"))
    return source.settings, trained.on_one_device(source, source.settings)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_equal_and_files_come_back_bit_for_bit(case, tmp_path):
    """Rows padded on the right and on the left; what we write loads there and gives the same logits."""
    model = model_of(case)
    settings, params = converted(model, tmp_path)
    batch = check.batch(settings)
    wanted = check.theirs(model, batch, settings.data.bos_id)
    found = check.compared(check.ours(settings, params, batch), wanted, batch)
    print(f"{case}: {found}")
    assert found.largest <= 1e-4 * found.scale, found
    assert (
        command.main(
            ["convert", f"--source={tmp_path / 'run'}", f"--target={tmp_path / 'back'}", "--check=True"]
        )
        == 0
    )
    theirs, back = (sources.hugging_face(tmp_path / name).tensors for name in ("theirs", "back"))
    assert back.keys() - theirs.keys() <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert theirs.keys() <= back.keys()
    for name, tensor in theirs.items():
        assert sources.same(tensor, back[name]), name


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "qwen2", "qwen3, dense first"])
def test_fused_files_are_the_same_model(case, tmp_path):
    """As `transformers` 5 has experts in memory; halves of the gate swapped would change the logits."""
    model = model_of(case)
    settings, params = converted(model, tmp_path, save_original_format=False)
    assert any("gate_up_proj" in name for name in sources.hugging_face(tmp_path / "theirs").tensors)
    batch = check.batch(settings)
    found = check.compared(check.ours(settings, params, batch), check.theirs(model, batch), batch)
    assert found.largest <= 1e-4 * found.scale, found


@pytest.mark.parametrize("experts", [1, 4])
def test_a_run_of_ours_is_the_same_model_there(experts, tmp_path, user_environment):
    """Of factors of capacity and groups of sequences, which theirs can't say, become slots of a sequence."""
    arguments = [*TINY, f"--config.moe.num_experts={experts}", "--config.train.num_steps=1"]
    run = [sys.executable, "-m", "experiments.run", "--workdir=run", *arguments]
    subprocess.run(run, env=user_environment, cwd=tmp_path, check=True, capture_output=True)
    convert = [
        sys.executable,
        "-m",
        "experiments.convert",
        "--source=run",
        "--target=there/model",
        "--check=True",
    ]
    done = subprocess.run(convert, env=user_environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "check: logits differ" in done.stdout, done.stderr


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "identity"])
def test_its_tokenizer_reads_text_as_the_run_does(normalization, tmp_path):
    data = DataSettings(vocab_size=500, normalization=normalization)
    vocabulary = load_vocabulary(data, texts.load(data, "train"))
    for name, content in tokenizer.files(vocabulary, None, 1).items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == vocabulary.size
    for text in ("The city  of Paris", " blanks ", "tab\tand\nline", "é ﬁ 😀 日本語…", "", "a\u00a0b"):
        ids = vocabulary.encode(text).tolist()
        assert theirs(text).input_ids == [*ids, 1]
        assert theirs.decode(ids) == vocabulary.decode(ids)
    assert theirs("a <extra_id_7>").input_ids[-2] == vocabulary.sentinel(7)


@pytest.mark.parametrize("case", ["switch", "mixtral"])
def test_torchs_own_files_are_read_without_it(case, tmp_path):
    model = model_of(case)
    settings, params = converted(model, tmp_path)
    state = {name: leaf for name, leaf in model.state_dict().items()}
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "theirs" / "config.json").read_text())
    torch.save(state, tmp_path / "pickled" / "pytorch_model.bin")
    convert.into_run(convert.recognised(tmp_path / "pickled"), tmp_path / "other", "", quiet)
    source = trained.find(str(tmp_path / "other"))
    other = trained.on_one_device(source, settings)
    for one, two in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_gradients_of_the_loss_are_equal(case, tmp_path):
    """Of the mean cross-entropy of the same targets, for every parameter."""
    model = model_of(case)
    settings, params = converted(model, tmp_path)
    tokens_BL = np.random.default_rng(3).integers(2, 333, (3, 10))
    encoder = "encoder" in settings.stacks
    inputs_BL = np.random.default_rng(4).integers(2, 333, (3, 9)) if encoder else None
    if encoder:
        loss = model(input_ids=torch.tensor(inputs_BL), labels=torch.tensor(tokens_BL)).loss
    else:  # ours reads `bos_id` first
        read_BL = np.pad(tokens_BL[:, :-1], ((0, 0), (1, 0)), constant_values=settings.data.bos_id)
        logits = model(input_ids=torch.tensor(read_BL)).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(tokens_BL).flatten())
    loss.backward()

    def own(params):
        given = None if inputs_BL is None else jnp.asarray(inputs_BL, jnp.int32)
        logits_BLV, _ = Transformer(settings).apply(
            {"params": params}, given, jnp.asarray(tokens_BL, jnp.int32)
        )
        log_BLV = jax.nn.log_softmax(logits_BLV)
        return -jnp.take_along_axis(log_BLV, jnp.asarray(tokens_BL)[..., None], axis=-1).mean()

    value, grads = jax.value_and_grad(own)(params)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    grads, family = (
        flatten_dict(jax.device_get(grads), sep="/"),
        convert.recognised(tmp_path / "theirs").family,
    )
    theirs = {name: leaf.grad.numpy() for name, leaf in model.named_parameters() if leaf.grad is not None}
    # As tensors of theirs in memory: fused experts, and the router behind `mlp`.
    shapes = {name: value.shape for name, value in theirs.items()}
    zero = {name: np.zeros(leaf.shape) for name, leaf in model.named_parameters() if leaf.grad is None}
    moves = tables.moves(family, settings, shapes | {name: value.shape for name, value in zero.items()})
    for move in moves:
        part = (theirs | zero)[move.theirs][move.lead][move.rows()]
        part = (run_files.transposed(part) if move.entry.form == LINEAR else part).reshape(move.shape)
        found = grads[move.ours][move.index]
        # Of a parameter's largest: float32 sums in another order, through all blocks.
        assert np.abs(found - part).max() <= 1e-3 * max(1e-2, np.abs(part).max()), move


@pytest.mark.parametrize(
    "case",
    [
        "switch",
        "switch over capacity",
        "t5, gated, untied",
        "mixtral",
        "olmoe",
        "qwen2",
        "qwen3, dense first",
    ],
)
def test_greedy_and_beams_give_the_same_tokens(case, tmp_path):
    """Of a Switch over its capacity, too: its encoder drops the tokens of a prompt that find no slot."""
    model = model_of(case)
    settings, params = converted(model, tmp_path)
    prompts = np.random.default_rng(5).integers(3, 333, (3, 40 if "over" in case else 7))
    model.generation_config.eos_token_id = None
    # With a cache their `generate` fails where the decoder has more layers than the encoder.
    encoder = "encoder" in settings.stacks
    cached = settings.layers("decoder") <= settings.layers("encoder") or not encoder
    own = Generator(settings, params, 8, Choosing(stop_ids=()))
    search = Generator(settings, params, 8, Choosing(stop_ids=()), beams=3)
    for generator, beams in ((own, 1), (search, 3)):
        with torch.no_grad():
            given = dict(
                max_new_tokens=8,
                do_sample=False,
                num_beams=beams,
                use_cache=cached,
                early_stopping=False,
            )
            wanted = model.generate(torch.tensor(prompts), **given)
        wanted = wanted[:, 1:] if encoder else wanted[:, prompts.shape[1] :]
        assert [answer.ids for answer in generator(prompts)] == wanted.tolist()


def test_the_check_has_tokens_over_a_switchs_capacity(tmp_path):
    """Else it would say that a model without slots is the same."""
    settings, params = converted(model_of("switch"), tmp_path)
    batch = check.batch(settings)
    moe = dataclasses.replace(settings.moe, dropless=True)
    other = check.ours(dataclasses.replace(settings, moe=moe), params, batch)
    found = check.compared(check.ours(settings, params, batch), other, batch)
    assert found.largest > 1e-2 * found.scale


def test_a_wrong_tensor_is_found_by_the_check(tmp_path, capsys):
    """Exit code 3, with the largest difference and its place."""
    model = model_of("mixtral")
    converted(model, tmp_path)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight *= 1.01
    model.save_pretrained(tmp_path / "other")
    (tmp_path / "run").rename(tmp_path / "first")
    code = command._checked(str(tmp_path / "first"), tmp_path / "other", 0.0)
    assert code == command.EXIT_DIFFERENT and "NOT the same model" in capsys.readouterr().out
    asked = [
        f"--source={tmp_path / 'theirs'}",
        f"--target={tmp_path / 'run'}",
        "--check=True",
        "--tolerance=1e-12",
    ]
    assert command.main(["convert", *asked]) == command.EXIT_DIFFERENT
