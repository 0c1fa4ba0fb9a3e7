"""A reward model as a scorer: the number of a plain forward, whatever stands beside the sample."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from kilter.data.chat import ChatEncoder
from kilter.models.build import reward_trunk
from kilter.models.trunk import Trunk
from kilter.records import Message, Sample
from kilter.scorers import RewardModelScorer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", ":", *(f"w{at}" for at in range(27))]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + ' :' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
END = 2


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = TEMPLATE
    return ChatEncoder(tokenizer)


@pytest.fixture(scope="module")
def trunk() -> Trunk:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), num_attention_heads=2, max_position_embeddings=32, pad_token_id=0, **sizes
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)
    return reward_trunk(model, generator=generator)


def some_samples(num_samples: int = 24) -> list[Sample]:
    """Several samples to most prompts, of different lengths, every fourth one cut off; one is empty."""
    draw = random.Random(0)
    samples = [Sample((Message("user", "w0"),), "")]
    for at in range(num_samples):
        messages = (Message("user", " ".join(f"w{draw.randrange(27)}" for _ in range(1 + at % 5))),)
        for _ in range(1 + at % 3):
            text = " ".join(f"w{draw.randrange(27)}" for _ in range(draw.randrange(1, 9)))
            samples.append(Sample(messages, text, finished=len(samples) % 4 != 0))
    return samples


def plain_reward(trunk: Trunk, encoder: ChatEncoder, sample: Sample) -> float:
    """The head at the last token of a forward of its own."""
    ids = (*encoder.prompt(sample.messages), *(WORDS.index(word) for word in sample.text.split()))
    ids = (*ids, END) if sample.finished else ids
    with torch.no_grad():
        hidden = trunk.models["reward"](torch.tensor([ids])).last_hidden_state[0, -1]
        return float(hidden @ trunk.heads["reward"].weight[0])


def test_a_score_is_that_of_a_forward_of_its_own(trunk: Trunk, encoder: ChatEncoder) -> None:
    samples = some_samples()
    scores = RewardModelScorer(trunk, encoder).score(samples)
    expected = [plain_reward(trunk, encoder, sample) for sample in samples]
    assert torch.tensor(expected).std() > 0.1
    torch.testing.assert_close([score.value for score in scores], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [(16, 16), (40, 80), (512, 8192)])
def test_a_score_depends_on_nothing_beside_it(trunk: Trunk, encoder: ChatEncoder, budget: tuple[int, int]) -> None:
    samples = some_samples()
    whole = RewardModelScorer(trunk, encoder).score(samples)
    other = RewardModelScorer(trunk, encoder, row_tokens=budget[0], batch_tokens=budget[1])
    order = random.Random(1).sample(range(len(samples)), len(samples))
    shuffled = other.score([samples[at] for at in order])
    for at, score in zip(order, shuffled, strict=True):
        assert score.value == pytest.approx(whole[at].value, abs=1e-5)
    alone = [other.score([sample])[0].value for sample in samples[:5]]
    assert alone == pytest.approx([score.value for score in whole[:5]], abs=1e-5)


def test_what_cannot_be_read_is_unscored_with_its_reason(trunk: Trunk, encoder: ChatEncoder) -> None:
    user = (Message("user", "w1 w2"),)
    long, fits = " ".join(["w1"] * 28), " ".join(["w1"] * 27)  # BOS, 2 words, ":", answer, EOS against 32 positions
    samples = [Sample(user, long), Sample(user, "w3"), Sample(user, "", finished=False), Sample(user, fits)]
    scores = RewardModelScorer(trunk, encoder).score(samples)
    assert [score.value is None for score in scores] == [True, False, True, False]
    assert scores[0].reason == "33 tokens; the reward model reads 32"
    assert scores[2].reason == "the answer is empty and was cut"
    assert RewardModelScorer(trunk, encoder, max_tokens=6).score(samples[3:])[0].value is None
    assert RewardModelScorer(trunk, encoder).score([]) == []


def test_a_broken_reward_model_scores_nothing(trunk: Trunk, encoder: ChatEncoder) -> None:
    with torch.no_grad():
        kept = trunk.heads["reward"].weight.clone()
        trunk.heads["reward"].weight.fill_(torch.nan)
        (score,) = RewardModelScorer(trunk, encoder).score([Sample((Message("user", "w1"),), "w2")])
        trunk.heads["reward"].weight.copy_(kept)
    assert score.value is None and "nan" in score.reason
