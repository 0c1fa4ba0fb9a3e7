"""`kilter chat MODEL`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

from pydantic import Field

from kilter.cli.options import parse
from kilter.config import DecodingConfig
from kilter.errors import ConfigError, visible

UNFINISHED = "\ufffd"
"""What the first bytes of a letter look like before the last has come."""


class ChatOptions(DecodingConfig):
    """Talk to a model. An empty line forgets the conversation; Ctrl-D leaves."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    """Divides the logits; 0 is greedy."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    """Length limit of an answer, tokens."""
    system: str = ""
    """A system message to begin with."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed and the same words give the same answers."""


HELP = "kilter chat runs/demo/stages/05-ppo/result --temperature 0"


def run(command: str, argv: list[str]) -> int:
    """Read lines from stdin, print answers."""
    prog = f"kilter {command} MODEL"
    if not argv or argv[0] in ("-h", "--help"):
        parse(ChatOptions, ["--help"], prog=prog, default=ChatOptions(), example=HELP)
    if argv[0].startswith("-"):
        raise ConfigError(f"{prog}: the model comes first, before {argv[0]}")
    options = parse(ChatOptions, argv[1:], prog=prog, default=ChatOptions(), example=HELP)
    import torch

    from kilter.data.chat import ChatEncoder
    from kilter.models.build import policy_trunk
    from kilter.models.generation import NativeSampler
    from kilter.models.load import load_model, load_tokenizer
    from kilter.models.sampling import Sampling, Stops, draw_seeds
    from kilter.records import Message

    encoder = ChatEncoder(load_tokenizer(argv[0]))
    sampler = NativeSampler(policy_trunk(load_model(argv[0])), "policy")
    sampling = Sampling.of(options)
    stops = Stops(encoder.stop_ids, sampling.stop, decode=encoder.decode)
    generator = torch.Generator().manual_seed(options.seed)
    opening = (Message("system", options.system),) if options.system else ()
    messages = opening
    while True:
        if sys.stdin.isatty():
            print("you> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if not line.strip():
            messages = opening
            continue
        messages = (*messages, Message("user", line.strip()))
        seed = int(draw_seeds(generator, 1, 1))
        text = shown = ""
        for ids in sampler.stream(encoder.prompt(messages), seed, sampling=sampling, stops=stops):
            text = sampling.cut(encoder.decode(ids))
            settled = sampling.settled(text)
            if not settled.endswith(UNFINISHED) and settled.startswith(shown):
                print(visible(settled[len(shown) :]), end="", flush=True)
                shown = settled
        print(visible(text[len(shown) :]) if text.startswith(shown) else "\n" + visible(text))
        messages = (*messages, Message("assistant", text))
