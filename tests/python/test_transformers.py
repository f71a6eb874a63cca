"""transformers with kt_kernel's experts: logits of tiny models, tokens of the demo model, and what is refused."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from reference import BOUNDS
from transformers import AutoModelForCausalLM, AutoTokenizer

import kt_kernel.integrations.transformers as kt_transformers
from kt_kernel import demo
from kt_kernel.config import EngineConfig

ENGINE = EngineConfig(num_threads=2, num_nodes=1)
LAYERS = 3
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
QWEN = {**SIZES, "moe_intermediate_size": 48, "num_experts": 6}
CONFIGS = {
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=32, norm_topk_prob=True),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**QWEN, head_dim=16, norm_topk_prob=True),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=6),
}
IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    kt_transformers.register(engine=ENGINE)
    yield
    kt_transformers.register()


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    for parameter in model.parameters():
        # larger than the initializer's, so that experts matter for the logits; bf16 values, so that BF16 is exact
        parameter.data = (parameter.data if parameter.dim() == 1 else parameter.data * 4).bfloat16().float()
    model.to(dtype).save_pretrained(folder)
    return folder


def load(folder: Path, implementation: str = "kt_kernel", **options):
    options.setdefault("dtype", torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=implementation, **options)


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.double()


def experts_of(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")]


# --- numbers ---


@pytest.mark.parametrize("num_gpu_experts", [0, 2])
@pytest.mark.parametrize("method", list(BOUNDS))
@pytest.mark.parametrize("family", CONFIGS)
def test_each_layer_equals_its_own_experts(tmp_path: Path, family: str, method: str, num_gpu_experts: int) -> None:
    """The same inputs to every layer of both, so that the bound of one layer applies."""
    kt_transformers.register(method, num_gpu_experts=num_gpu_experts, engine=ENGINE)
    save(tmp_path, family)
    inputs: list[tuple] = []
    plain = load(tmp_path, "eager")
    hooks = [m.register_forward_hook(lambda _m, a, out: inputs.append((a, out))) for m in experts_of(plain)]
    logits(plain)
    assert len(hooks) == len(inputs) == LAYERS
    for module, (arguments, wanted) in zip(experts_of(load(tmp_path)), inputs, strict=True):
        with torch.no_grad():
            found = module(*arguments)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        error = (found.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < BOUNDS[method]
        assert error > 0, "these are the model's own experts"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_equal_those_of_its_own_experts(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Against the model in fp32; the seed has no router that is undecided within rounding, which no bound would cover.

    Each MoE layer errs by 2^-6 of its own output at most (reference.py), in fp32 and bf16 and fp16 alike, and a
    residual stream carries it to the logits no more than in full (every layer's output is a part of the stream). The
    rest of the network in bf16 rounds the stream and each sublayer's input, weights product and output: 4 roundings of
    2^-8 for each of 2 sublayers.
    """
    wanted = logits(load(save(tmp_path, family), "eager"))
    model = load(tmp_path, dtype=dtype)
    found = logits(model)
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    bound = LAYERS * (BOUNDS["BF16"] + 8 * rounding)
    assert (found - wanted).norm() / wanted.norm() < bound
    assert all(module.gate_up_proj.numel() == 0 for module in experts_of(model)), "the weights were not freed"


def test_a_step_with_a_cache_equals_one_without(tmp_path: Path) -> None:
    model = load(save(tmp_path, "qwen3_moe"))
    with torch.no_grad():
        first = model(IDS[:, :-1], use_cache=True)
        step = model(IDS[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    # a batch of one token and one of all: other kernels for BF16, sums in another order
    torch.testing.assert_close(step.double(), logits(model)[:, -1], rtol=1e-2, atol=1e-2)


def test_transformers_computes_them_by_the_library(tmp_path: Path) -> None:
    model = load(save(tmp_path, "qwen2_moe"))
    logits(model)
    layers = [getattr(module, kt_transformers._ATTRIBUTE) for module in experts_of(model)]
    counters = [layer.wrapper.moe.counters() for layer in layers]
    assert [row["rows"] for row in counters] == [IDS.numel() * 2] * LAYERS
    assert [layer.config.layer_idx for layer in layers] == list(range(LAYERS))


def test_every_model_numbers_its_own_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also two whose layers are packed by turns, and one made after others are gone."""
    save(tmp_path, "qwen3_moe")

    def numbers(model) -> list[int]:
        return [getattr(module, kt_transformers._ATTRIBUTE).config.layer_idx for module in experts_of(model)]

    first, second = load(tmp_path), load(tmp_path)
    arguments = torch.randn(3, 64), torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)
    with torch.no_grad(), caplog.at_level(logging.INFO, "kt_kernel.transformers"):
        for pair in zip(experts_of(first), experts_of(second), strict=True):
            for module in pair:
                module(*arguments)
    assert numbers(first) == numbers(second) == list(range(LAYERS))
    assert len(caplog.records) == 2, "each model says once what computes its experts"
    del first, second
    third = load(tmp_path)
    logits(third)
    logits(third)
    assert numbers(third) == list(range(LAYERS))


def test_absent_experts_add_nothing(tmp_path: Path) -> None:
    """transformers marks slots of other ranks with the number of experts."""
    module = experts_of(load(save(tmp_path, "qwen3_moe")))[0]
    hidden = torch.randn(3, 64)
    index = torch.tensor([[0, 1], [2, 6], [6, 6]])
    weights = torch.tensor([[0.5, 0.5], [0.25, 9.0], [9.0, 9.0]])
    output = module(hidden, index, weights).detach()
    assert output[2].abs().max() == 0
    assert torch.equal(output[1], module(hidden[1:2], torch.tensor([[2, 2]]), torch.tensor([[0.25, 0.0]])).detach()[0])


def test_the_environment_names_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "mixtral")
    monkeypatch.setenv("KT_METHOD", "AMXINT4")
    model = load(tmp_path)
    assert kt_transformers.pack_experts(model) == LAYERS
    layer = getattr(experts_of(model)[0], kt_transformers._ATTRIBUTE)
    assert layer.wrapper.method == "AMXINT4"
    assert kt_transformers.pack_experts(model) == 0
    monkeypatch.setenv("KT_METHOD", "FP9")
    with pytest.raises(ValueError, match="KT_METHOD: method 'FP9' is unknown; kt_kernel supports AMXINT8"):
        kt_transformers.register()
    with pytest.raises(ValueError, match="KT_METHOD: method 'FP9' is unknown"):
        logits(load(tmp_path))
    monkeypatch.setenv("KT_METHOD", "FP8")
    with pytest.raises(ValueError, match="KT_METHOD: method FP8 keeps the codes .*use one of AMXINT8"):
        kt_transformers.register()
    monkeypatch.setenv("KT_METHOD", "FP9")
    kt_transformers.register("AMXINT8")  # takes its place
    command = [sys.executable, "-c", "import kt_kernel.integrations.transformers"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: KT_METHOD: method 'FP9' is unknown")


def test_the_log_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(save(tmp_path, "mixtral"))
    with caplog.at_level(logging.INFO, "kt_kernel.transformers"):
        kt_transformers.pack_experts(model)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("experts are computed by kt_kernel, method BF16: ")


def test_weights_can_be_kept(tmp_path: Path) -> None:
    kt_transformers.register(free_weights=False, engine=ENGINE)
    plain = load(save(tmp_path / "a", "qwen3_moe"), "eager")
    model = load(tmp_path / "a")
    found = logits(model)
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b", "eager")), logits(plain))
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(plain))
    model.set_experts_implementation("kt_kernel")
    for module in experts_of(model):
        module.down_proj.data.zero_()
    assert torch.equal(logits(model), found)
    assert kt_transformers.pack_experts(model) == LAYERS
    assert not torch.equal(logits(model), found)


# --- what is refused ---


def test_a_packed_model_is_neither_saved_nor_copied_nor_trained(tmp_path: Path) -> None:
    model = load(save(tmp_path, "qwen3_moe"))
    output = model(IDS)
    with pytest.raises(RuntimeError, match=r"have no gradient; run the model under torch.no_grad\(\)"):
        output.logits.sum().backward()
    with pytest.raises(RuntimeError, match="experts.gate_up_proj were freed when kt_kernel packed them; to save the"):
        model.save_pretrained(tmp_path / "other")
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match=r"freed when kt_kernel packed them; .*load the model again with .*'eager'"):
        logits(model)
    model.set_experts_implementation("kt_kernel")
    assert torch.equal(logits(model), output.logits)
    model.train()
    with pytest.raises(RuntimeError, match=r"cannot be trained; call model.eval\(\) or choose another implementation"):
        model(IDS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": torch.nn.ReLU()}, r"combines gate and up in a way of its own \(activation ReLU\)"),
        ({"has_gate": False}, "its experts have no gate"),
        ({"is_concatenated": False}, "combines gate and up in a way of its own"),
    ],
)
def test_experts_of_another_kind_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    model = load(save(tmp_path, "qwen3_moe"))
    for name, value in change.items():
        setattr(experts_of(model)[0], name, value)
    with pytest.raises(NotImplementedError, match=f"cannot compute Qwen3MoeExperts: .*{words}.*; choose another"):
        logits(model)


def test_a_gate_of_its_own_and_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(save(tmp_path, "mixtral"))
    module = experts_of(model)[0]
    module.to(torch.float64)
    with pytest.raises(NotImplementedError, match="its weights are torch.float64"):
        kt_transformers.pack_experts(model)
    module.to("meta")
    with pytest.raises(NotImplementedError, match="its weights are offloaded; load the model with its experts on"):
        kt_transformers.pack_experts(model)
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, x: x)
    with pytest.raises(NotImplementedError, match="it combines gate and up in a way of its own"):
        kt_transformers.pack_experts(model)
    with pytest.raises(ValueError, match="MixtralForCausalLM has no experts to pack; make it with from_pretrained"):
        kt_transformers.pack_experts(load(tmp_path, "eager"))
    for name, words in (("NOPE", "method 'NOPE' is unknown"), ("FP8", "method FP8 keeps the codes .*use one of AMX")):
        with pytest.raises(ValueError, match=words):
            kt_transformers.register(name)


# --- the demo model ---


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with 3 experts, 2 a token: 0.6 GB."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    demo.make_demo(folder, demo.Upcycling(num_experts=3))
    return folder


QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Name three colours.",
    "How do I boil an egg?",
)
NUM_TOKENS = 24
BEST = 10  # tokens whose logits are compared
# Values that a layer rounds to bf16 with our experts, as squares of what they add to a lead. In fp32 ours are the only
# ones: x, which gate and up see alike (2 * 2), and the intermediate. In bf16: the intermediate and the output, and of
# the rest two norms, q, k, v, scores, softmax, attention, its projection and two sums.
ROUNDINGS = {torch.float32: 5, torch.bfloat16: 13}


@dataclass(frozen=True)
class Answer:
    """A greedy answer of the model with its own experts in fp32, and the logits that decide each of its tokens."""

    prompt: torch.Tensor
    tokens: list[int]
    exact: torch.Tensor


def greedy(model, prompt: torch.Tensor) -> list[int]:
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
    )
    return made[0, prompt.shape[1] :].tolist()


def deciding_logits(model, prompt: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Logits for each token of an answer, given the tokens before it."""
    ids = torch.cat([prompt, torch.tensor([tokens])], dim=1)
    return logits(model, ids)[0, prompt.shape[1] - 1 : -1]


@pytest.fixture(scope="module")
def answers(demo_model: Path) -> list[Answer]:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = load(demo_model, "eager")
    made = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = greedy(model, prompt.input_ids)
        made.append(Answer(prompt.input_ids, tokens, deciding_logits(model, prompt.input_ids, tokens)))
    assert "Paris" in tokenizer.decode(made[0].tokens)
    return made


def tie(exact: torch.Tensor, dtype: torch.dtype, num_layers: int) -> torch.Tensor:
    """How much rounding may move the lead of one token over another, at each position.

    A rounding to bf16 errs by up to 2^-9 of the value, evenly: 2^-9 / sqrt(3) in the root mean square. Independent
    errors of n roundings in each of L layers add up to sqrt(n L) of it of the residual stream, if every layer's output
    were all of the stream, and so of the logits' standard deviation (what moves all of them moves no lead). A lead is a
    difference of two. Four of its standard deviations are a tie.
    """
    return 4 * 2**0.5 * (ROUNDINGS[dtype] * num_layers / 3) ** 0.5 * 2**-9 * exact.std(dim=1)


def check_choices(answer: Answer, own: list[int], ours: list[int], ties: torch.Tensor) -> None:
    """Check that choices differ only at ties of the model's own logits."""
    pairs = enumerate(zip(own, ours, strict=True))
    differ = [(i, abs(answer.exact[i, a] - answer.exact[i, b]).item(), ties[i].item()) for i, (a, b) in pairs if a != b]
    print(f"{len(own)} tokens; differences (position, lead, tie): {differ}")
    assert all(lead < allowed for _, lead, allowed in differ)


def test_the_demo_model_gives_the_same_tokens(demo_model: Path, answers: list[Answer]) -> None:
    """Greedy answers in fp32 with its own experts and with ours: equal to the end, or to a tie of its own logits.

    Behind a difference two answers are about different texts, so ours is also asked for each token of the model's own
    answer, given the tokens before it.
    """
    model = load(demo_model)
    num_equal = num_compared = num_certain = num_rows = 0
    for answer in answers:
        ties = tie(answer.exact, torch.float32, model.config.num_hidden_layers)
        found = greedy(model, answer.prompt)
        same = next((i for i, pair in enumerate(zip(answer.tokens, found, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            assert found == answer.tokens
        upto = len(found) if same is None else same + 1
        check_choices(answer, answer.tokens[:upto], found[:upto], ties)
        asked = deciding_logits(model, answer.prompt, answer.tokens).argmax(dim=1).tolist()
        check_choices(answer, answer.tokens, asked, ties)
        num_equal += same is None
        num_compared += upto
        best = answer.exact.topk(2).values
        num_certain += int((best[:, 0] - best[:, 1] > ties).sum())
        num_rows += 2 * (2 * answer.prompt.numel() + len(found) - 1 + len(answer.tokens))
    num_tokens = sum(len(answer.tokens) for answer in answers)
    print(f"{num_compared} of {num_tokens} tokens compared, {num_certain} without a tie, {num_equal} answers equal")
    assert num_equal >= 2
    assert num_compared > num_tokens / 2 and num_certain > num_tokens / 2, "too little for the test to mean something"
    layers = [getattr(module, kt_transformers._ATTRIBUTE) for module in experts_of(model)]
    assert [layer.wrapper.moe.counters()["rows"] for layer in layers] == [num_rows] * len(layers)


def test_the_demo_model_chooses_the_same_tokens_in_bf16(demo_model: Path, answers: list[Answer]) -> None:
    """Each token of the answers, given those before it; the model's own experts round more often than ours do."""
    found = {}
    for implementation in ("eager", "kt_kernel"):
        model = load(demo_model, implementation, dtype=torch.bfloat16)
        found[implementation] = [deciding_logits(model, answer.prompt, answer.tokens) for answer in answers]
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for index, answer in enumerate(answers):
        own, ours = (found[name][index].argmax(dim=1).tolist() for name in found)
        check_choices(answer, own, ours, tie(answer.exact, torch.bfloat16, model.config.num_hidden_layers))
        best = answer.exact.topk(BEST).indices
        for name in found:
            moved = (found[name][index] - answer.exact).gather(1, best)
            errors[name].append(moved[:, :1] - moved[:, 1:])
    rms = {name: torch.cat(parts).pow(2).mean().sqrt().item() for name, parts in errors.items()}
    print(f"root mean square errors of leads: {rms}")
    assert rms["kt_kernel"] < 1.25 * rms["eager"]
