"""Sampling: the same numbers as the trainer's, the same tokens as transformers' greedy, independent of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from families import SEGMENTED, untouched_model

from kilter.errors import ConfigError, ModelError
from kilter.models import decoding, generation
from kilter.models.build import policy_trunk
from kilter.models.cached import COLUMN_BLOCK
from kilter.models.generation import Completion, NativeSampler
from kilter.models.roles import Lora, Role, add_adapter
from kilter.models.sampling import Sampling, Stops, draw, draw_seeds, restrict, uniforms
from kilter.models.trunk import Trunk
from kilter.tree import Group, Response, make_batches, split_by_response

VOCAB, WINDOW, STEPS = 61, 7, 20
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "head_dim": 8}
KINDS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": transformers.Gemma2Config(**SIZES, **MIXED, **CAPS),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, **MIXED, head_dim=8),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, **NO_DROPOUT
    ),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0),
}


def model_of(kind: str, seed: int = 0) -> Any:
    """A tiny random model with sharp attention, so that a lost window or mask shows."""
    attention = "eager" if kind == "gemma2" else None
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind], attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5, generator=generator)
    return model


def some_prompts(lengths: Sequence[int] = (1, 9, 4, 12, 4)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def sample(trunk: Trunk, prompts: Sequence[Sequence[int]], seed: int = 2, **options: Any) -> list[list[Completion]]:
    sampler = NativeSampler(trunk, options.pop("role", "policy"), batch_size=options.pop("batch_size", 128))
    seeds = draw_seeds(torch.Generator().manual_seed(seed), len(prompts), options.pop("num_samples", 3))
    stops = Stops(options.pop("stop_ids", (2, 5)))
    limits = options.pop("limits", None)
    sampling = Sampling(**({"max_new_tokens": STEPS} | options))
    return sampler.sample(prompts, seeds, sampling=sampling, stops=stops, limits=limits)


def flat(groups: list[list[Completion]]) -> list[Completion]:
    return [answer for group in groups for answer in group]


def trainer_logprobs(trunk: Trunk, answers: Sequence[Completion], role: str = "policy") -> torch.Tensor:
    """Through the packed tree, all answers to a prompt in one group, in the order of `answers`."""
    prompts = dict.fromkeys(answer.prompt for answer in answers)
    numbered = list(enumerate(answers))
    groups = [
        Group(
            prompt,
            tuple(Response(a.ids, per_response={"at": float(at)}) for at, a in numbered if a.prompt == prompt),
        )
        for prompt in prompts
    ]
    (batch,) = make_batches(groups, row_tokens=10_000, batch_tokens=10_000)
    with torch.no_grad():
        logprobs = trunk(batch.tree, {role: "logprobs"})[role]
    parts = split_by_response(logprobs, batch.tree.leaf, len(answers))
    return torch.cat([parts[at] for at in batch.extras["at"].argsort().tolist()])


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_logprobs_are_the_trainers(kind: str) -> None:
    trunk = policy_trunk(model_of(kind))
    answers = flat(sample(trunk, some_prompts(), num_samples=8))
    assert any(answer.finished for answer in answers)
    assert any(len(answer.prompt) + len(answer.ids) > COLUMN_BLOCK > WINDOW for answer in answers)
    ours = torch.tensor([number for answer in answers for number in answer.logprobs])
    torch.testing.assert_close(ours, trainer_logprobs(trunk, answers), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SEGMENTED)
def test_every_family_decodes_with_its_prompts_held_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long answers and short ones, so that caches grow and rows and prompts leave; two columns of cache at first."""
    monkeypatch.setattr(decoding, "FIRST_COLUMNS", 2)
    monkeypatch.setattr(decoding, "ROW_TOKENS", 16)
    model = untouched_model(family).double()
    model.set_experts_implementation("eager")
    trunk = policy_trunk(model)
    limits = torch.randint(1, 50, (5, 4), generator=torch.Generator().manual_seed(0))
    drawn = sample(trunk, some_prompts(), num_samples=4, max_new_tokens=50, stop_ids=(), limits=limits, batch_size=9)
    answers = flat(drawn)
    assert [len(answer.ids) for answer in answers] == limits.flatten().tolist()
    ours = torch.tensor([number for answer in answers for number in answer.logprobs])
    torch.testing.assert_close(ours, trainer_logprobs(trunk, answers), rtol=0, atol=1e-5)


def test_the_fast_way_is_taken_where_attention_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for name in ("SharedRows", "CachedRows"):
        rows = getattr(generation, name)
        monkeypatch.setattr(generation, name, lambda *a, rows=rows, name=name: (used.append(name), rows(*a))[1])
    for kind in ("llama", "gemma3", "gemma2", "bloom"):
        sample(policy_trunk(model_of(kind)), [[3]], num_samples=1, max_new_tokens=2)
    assert used == ["SharedRows", "SharedRows", "CachedRows", "CachedRows"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_transformers_greedy(kind: str) -> None:
    model = model_of(kind)
    prompts = some_prompts()
    ours = sample(policy_trunk(model), prompts, temperature=0.0, num_samples=1, stop_ids=(2,))
    for prompt, (answer,) in zip(prompts, ours, strict=True):
        theirs = model.eval().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=STEPS,
            eos_token_id=2,
            pad_token_id=0,
        )
        assert list(answer.ids) == theirs[0, len(prompt) :].tolist()
        assert set(answer.logprobs) == {0.0}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bloom"])
def test_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    trunk = policy_trunk(model_of(kind))
    sizes = (64, 8, 4, 2, 1)  # room for all; for two prompts, of which one ends first; for less than one prompt
    whole, *others = (sample(trunk, some_prompts(), batch_size=size) for size in sizes)
    for other in others:
        for one, two in zip(flat(whole), flat(other), strict=True):
            assert one.ids == two.ids and one.finished == two.finished
            torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), rtol=0, atol=1e-5)
    alone = sample(trunk, some_prompts()[:2])
    assert [answer.ids for answer in alone[1]] == [answer.ids for answer in whole[1]]


def test_samples_of_one_prompt_differ_and_repeat_under_a_seed() -> None:
    trunk = policy_trunk(model_of("llama"))
    first, again, other = (sample(trunk, some_prompts(), seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert all(len({answer.ids for answer in group}) > 1 for group in first)
    twice = sample(trunk, [[3, 4], [3, 4]])
    assert [answer.ids for answer in twice[0]] != [answer.ids for answer in twice[1]]


def test_nothing_asked_for_is_nothing_drawn() -> None:
    trunk = policy_trunk(model_of("llama"))
    assert sample(trunk, []) == []
    assert sample(trunk, [[3], [4]], num_samples=0) == [[], []]


def test_the_end_token_at_once_is_an_answer_and_no_end_token_is_none() -> None:
    trunk = policy_trunk(model_of("llama"))
    for group in sample(trunk, some_prompts(), stop_ids=range(VOCAB)):
        assert all(len(answer.ids) == len(answer.logprobs) == 1 and answer.finished for answer in group)
    for group in sample(trunk, some_prompts(), stop_ids=()):
        assert all(len(answer.ids) == STEPS and not answer.finished for answer in group)


def test_an_answer_ends_with_its_first_stop_token() -> None:
    for group in sample(policy_trunk(model_of("llama")), some_prompts(), num_samples=8):
        for answer in group:
            stops = [at for at, token in enumerate(answer.ids) if token in (2, 5)]
            assert stops == ([len(answer.ids) - 1] if answer.finished else [])


def test_roles_answer_with_their_own_adapter_and_the_model_stays_as_it_was() -> None:
    model = model_of("llama").train()
    generator = torch.Generator().manual_seed(5)
    add_adapter(model, "tuned", Lora(rank=4, targets=("q_proj", "v_proj")), generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)
    trunk = Trunk({"m": model}, {"policy": Role("m", "tuned"), "reference": Role("m")})
    answers = {role: flat(sample(trunk, some_prompts(), role=role)) for role in ("policy", "reference")}
    assert [a.ids for a in answers["policy"]] != [a.ids for a in answers["reference"]]
    for role, own in answers.items():
        ours = torch.tensor([number for answer in own for number in answer.logprobs])
        torch.testing.assert_close(ours, trainer_logprobs(trunk, own, role), rtol=0, atol=1e-5)
    assert model.training


def test_uniforms_are_splitmix64_of_the_seed() -> None:
    def reference(seed: int, step: int) -> float:
        mask = 2**64 - 1
        z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 40) / 2**24

    assert reference(0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24  # the published first output of seed 0
    seeds = draw_seeds(torch.Generator().manual_seed(3), 2, 3)
    drawn = uniforms(seeds, 5)
    assert drawn.shape == (2, 3, 5)
    for place, seed in enumerate(seeds.flatten().tolist()):
        assert drawn.view(-1, 5)[place].tolist() == [reference(seed, step) for step in range(5)]
    many = uniforms(draw_seeds(torch.Generator().manual_seed(4), 100, 1), 1000)
    assert many.min() >= 0 and many.max() < 1
    assert abs(float(many.mean()) - 0.5) < 4 / (12 * many.numel()) ** 0.5  # four standard errors


def test_a_larger_vocabulary_is_drawn_from_as_word_by_word() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 1000, generator=generator)
    logits[:, ::3] = -torch.inf
    points = torch.rand(64, generator=generator)
    points[:4] = torch.tensor([0.0, 2**-24, 1 - 2**-24, 0.5])
    tokens, logprobs = draw(logits, points, Sampling())
    exact = logits.double().log_softmax(-1)
    mass = exact.exp().cumsum(-1)
    picked = torch.arange(64), tokens
    below = mass[picked] - exact.exp()[picked]
    assert bool((below - 1e-6 <= points).all() and (points <= mass[picked] + 1e-6).all())
    assert bool(logits[picked].isfinite().all())
    torch.testing.assert_close(logprobs.double(), exact[picked], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_precision_samples_what_its_trainer_computes(kind: str) -> None:
    low = policy_trunk(model_of(kind), compute_dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in low.state_dict().items()}
    answers = flat(sample(low, some_prompts(), num_samples=4))
    gaps = torch.tensor([number for one in answers for number in one.logprobs]) - trainer_logprobs(low, answers)
    assert 0 < gaps.abs().mean() < 0.02
    whole = trainer_logprobs(policy_trunk(model_of(kind)), answers)
    assert 0 < (whole - trainer_logprobs(low, answers)).abs().mean() < 0.05
    assert all(torch.equal(value, before[name]) for name, value in low.state_dict().items())


def test_drawing_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.7, 0.0]]).log()
    points = torch.tensor([0.0, 0.05, 0.15, 0.29, 0.35, 0.999, 1 - 2**-24])
    tokens, logprobs = draw(logits.expand(len(points), -1), points, Sampling())
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4, 4]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.2, 0.2, 0.7, 0.7, 0.7]))


def test_drawn_shares_are_the_distributions() -> None:
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    points = (torch.arange(10_000) + 0.5) / 10_000
    tokens, _ = draw(logits.expand(len(points), -1), points, Sampling(temperature=0.5))
    shares = torch.bincount(tokens, minlength=7) / len(points)
    torch.testing.assert_close(shares, (logits[0] / 0.5).softmax(-1), rtol=0, atol=2e-4)


def test_top_k_and_top_p_keep_the_likeliest_and_logprobs_are_of_what_is_left() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept = {name: restrict(logits, sampling)[0].isfinite().tolist() for name, sampling in RESTRICTIONS.items()}
    assert kept == {
        "top 2": [False, True, False, True],
        "top 9": [True, True, True, True],
        "0.4": [False, True, False, False],
        "0.41": [False, True, False, True],
        "0.9": [False, True, True, True],
        "both": [False, True, False, False],
        "min 0.5": [False, True, True, True],
        "min 0.8": [False, True, False, False],
    }
    _, logprobs = draw(logits, torch.tensor([0.9]), Sampling(top_k=2))
    assert abs(logprobs.exp().item() - 0.3 / 0.7) < 1e-6


RESTRICTIONS = {
    "top 2": Sampling(top_k=2),
    "top 9": Sampling(top_k=9),
    "0.4": Sampling(top_p=0.399),
    "0.41": Sampling(top_p=0.41),
    "0.9": Sampling(top_p=0.899),
    "both": Sampling(top_k=2, top_p=0.5),  # of the two that are left, 4/7 > 0.5 is enough
    "min 0.5": Sampling(min_p=0.499),  # of the likeliest, 0.4
    "min 0.8": Sampling(min_p=0.76),
}


def test_restrictions_and_repetition_are_those_of_transformers() -> None:
    trunk = policy_trunk(model_of("llama"))
    prompt = [3, 4, 5, 3]
    settings = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.7}
    (answers,) = sample(trunk, [prompt], num_samples=8, max_new_tokens=12, stop_ids=(), **settings)
    model = trunk.models["policy"].eval()
    warpers = [
        transformers.RepetitionPenaltyLogitsProcessor(1.7),
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.05),
    ]
    for answer in answers:
        ids = torch.tensor([prompt + list(answer.ids)])
        with torch.no_grad():
            logits = model(ids).logits
        for at, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            scores = logits[:, len(prompt) + at - 1]
            for warp in warpers:
                scores = warp(ids[:, : len(prompt) + at], scores)
            assert abs(float(scores.log_softmax(-1)[0, token]) - logprob) < 1e-5


def test_a_stop_text_ends_an_answer_wherever_its_tokens_end() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    trunk = policy_trunk(model_of("llama"))
    seeds = draw_seeds(torch.Generator().manual_seed(0), 4, 8)
    prompts = some_prompts((2, 3, 4, 5))
    free = NativeSampler(trunk, "policy").sample(prompts, seeds, sampling=Sampling(max_new_tokens=40), stops=Stops(()))
    stop = decode(free[1][2].ids[5:7])  # two tokens
    sampling = Sampling(stop=(stop, "not there"), max_new_tokens=40)
    asked: list[int] = []
    stops = Stops((), sampling.stop, decode=lambda ids: (asked.append(len(ids)), decode(ids))[1])
    ended = NativeSampler(trunk, "policy").sample(prompts, seeds, sampling=sampling, stops=stops)
    for without, answer in zip(flat(free), flat(ended), strict=True):
        text = decode(without.ids)
        place = text.find(stop)
        assert answer.finished == (place >= 0)
        assert answer.ids == (without.ids[: place + 2] if place >= 0 else without.ids)
        assert sampling.cut(decode(answer.ids)) == (text[:place] if place >= 0 else text)
    assert any(answer.finished for answer in flat(ended)) and not all(answer.finished for answer in flat(ended))
    whole = [length for length in asked if length > 1]
    assert len(whole) < sum(len(answer.ids) for answer in flat(ended)) / 5  # only after a token that can end the text


def test_a_part_of_a_stop_text_is_not_settled() -> None:
    sampling = Sampling(stop=("User:", "##"))
    assert [sampling.settled(text) for text in ("a Us", "a User", "a Use!", "b #", "", "#U")] == [
        "a ",
        "a ",
        "a Use!",
        "b ",
        "",
        "#",
    ]
    assert sampling.cut("one ## two User: three") == "one "


def test_an_answer_streams_as_it_is_drawn() -> None:
    sampler = NativeSampler(policy_trunk(model_of("llama")), "policy")
    sampling, stops = Sampling(max_new_tokens=40), Stops((2, 5))
    [[whole]] = sampler.sample([[3, 4]], torch.tensor([[7]]), sampling=sampling, stops=stops)
    parts = list(sampler.stream([3, 4], 7, sampling=sampling, stops=stops))
    assert parts == [list(whole.ids[:length]) for length in range(1, len(whole.ids) + 1)]


def test_temperature_is_in_the_logprobs() -> None:
    trunk = policy_trunk(model_of("llama"))
    (answers,) = sample(trunk, [[3, 4]], temperature=0.3, max_new_tokens=1, num_samples=16, stop_ids=())
    with torch.no_grad():
        logits = trunk.models["policy"](torch.tensor([[3, 4]])).logits[0, -1]
    expected = (logits / 0.3).log_softmax(-1)[[answer.ids[0] for answer in answers]]
    torch.testing.assert_close(torch.tensor([answer.logprobs[0] for answer in answers]), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{name} is {value}"):
        Sampling(**{name: value})


def test_what_cannot_be_sampled_is_refused() -> None:
    trunk = policy_trunk(model_of("llama"))
    with pytest.raises(ModelError, match="prompt 1 has no tokens"):
        sample(trunk, [[3], []])
    with pytest.raises(ModelError, match=r"prompt 0 has 46 tokens .* 64 positions"):
        sample(trunk, [[3] * 46])
    assert sample(trunk, [[3] * 45])
    with torch.no_grad():
        trunk.models["policy"].model.norm.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="not numbers"):
        sample(trunk, [[3]])
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match=r"Mamba.* without a key-value cache"):
        sample(policy_trunk(transformers.AutoModelForCausalLM.from_config(config)), [[3]])
