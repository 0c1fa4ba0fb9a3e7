"""The base model's parts: its tokenizer (BPE with byte fallback), its chat template and its Llama configuration."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
SPECIALS = (PAD, END, *ROLES)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY, POSITIONS = 1280, 512
# A word with the space before it, a number, a mark, or white space: no token spans two of them.
_PIECES = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]|\s+"


def train_tokenizer(texts: Iterable[str], *, size: int = VOCABULARY) -> Tokenizer:
    """A BPE vocabulary of `size` tokens learned from `texts`; any other text falls back to single bytes.

    The merges are learned first and the byte tokens added to the vocabulary afterwards as ordinary tokens, so that
    `<0x41>` typed by a user stays text. Encoding then decoding gives back every text.
    """
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = split
    pieces_size = size - len(SPECIALS) - len(byte_tokens)
    trainer = trainers.BpeTrainer(vocab_size=pieces_size, min_frequency=2, show_progress=False)
    learner.train_from_iterator(texts, trainer)
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    vocabulary = {token: number for number, token in enumerate((*SPECIALS, *byte_tokens, *pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in learned["merges"]], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def wrap(tokenizer: Tokenizer, *, positions: int = POSITIONS) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves and loads it, with its template, pad and end-of-turn token."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=positions,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    """A Llama of 1 to 2 million parameters for this vocabulary."""
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
    }
    return LlamaConfig(**(sizes | changes))


def make_model(config: LlamaConfig, generator: torch.Generator) -> LlamaForCausalLM:
    """A model with fresh values drawn from `generator` alone: normal, smaller where a layer writes to the stream."""
    model = LlamaForCausalLM(config)
    out = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = 0.02 if "embed" in name or "lm_head" in name else 0.6 * parameter.shape[1] ** -0.5
            scale = out if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            parameter.normal_(0.0, std * scale, generator=generator)
    return model
