"""From messages to token ids by spans: what is scored is known by position and never guessed from token values.

A conversation is rendered by the chat template, the text is cut where an answer begins and where its end token stands,
and the parts are encoded one after another. So an answer never changes the tokens of its prompt, the end token is
scored even where the padding token is the same one, and BOS stands once. Control strings that a person typed
(`</s>`, `<|im_end|>`) stay ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from kilter.errors import DataError, ModelError
from kilter.records import Conversation, Message

DEFAULT_TEMPLATE_NAME = "kilter-plain"
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% else %}{{ '\\n\\n' + message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
"""For tokenizers without a chat template. It needs no tokens of its own; `{{ bos_token }}` is put before it where the
tokenizer itself begins every text with BOS."""

BREAK = "\ufdd0"
"""Put inside a control string that a person typed, so that neither template nor tokenizer takes it for a token. The
text is cut there before it is encoded. U+FDD0 is a noncharacter: it has no place in text."""

ANCHORS = ("\n", "a", ".")
"""Neutral left contexts for encoding a piece from the middle of a text: the first that does not merge with it is used.
Without one, SentencePiece-like tokenizers begin every piece with a space of their own."""

TAIL_CHARS = 24
"""Characters of left context shown to the tokenizer; boundaries are decided by far fewer."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    chat_template: Any
    eos_token: Any
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: Any

    @property
    def all_special_tokens(self) -> Any: ...
    @property
    def added_tokens_decoder(self) -> Any: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def encode(self, text: Any, **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...
    def convert_tokens_to_ids(self, tokens: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and the half-open ranges of them that are scored, in order."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


PROBE: Conversation = (
    Message("user", "first question"),
    Message("assistant", "first answer"),
    Message("user", "second question"),
    Message("assistant", "second answer"),
)


class ChatEncoder:
    """Encodes conversations for one tokenizer and one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer (or anything with the methods of `Tokenizer`); it is not changed.
        template: a Jinja chat template in place of the tokenizer's own. Without both, the default one is taken; save
            `template` with the result either way.
    Raises:
        ModelError: the template drops answers or writes BOS twice, or there is no end token at all.
    """

    stop_ids: tuple[int, ...]
    """Tokens that end generation: the template's end of turn first, then the tokenizer's EOS."""
    pad_id: int
    """Fills unused places. It may be the EOS token: nothing is ever inferred from it."""
    prefix_stable: bool
    """Earlier turns look the same in a longer conversation. If not, each turn is scored in a row of its own."""
    notes: tuple[str, ...]
    """What a user should know about this template, one sentence each; empty for an ordinary one."""

    def __init__(self, tokenizer: Tokenizer, *, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._special = _special_strings(tokenizer)
        self._anchor_ids: dict[str, list[int]] = {}
        self._last_prompt: tuple[Conversation, str] | None = None
        self._typed = re.compile("(?!)")
        self.template_name, self.template = _choose_template(tokenizer, template)
        self._probe()

    # What the template does, found out once ------------------------------------------------------------------------

    def _probe(self) -> None:
        tokenizer, answer = self._tokenizer, PROBE[1].content
        prompt, single = self._render(PROBE[:1], True), self._render(PROBE[:2])
        try:
            double, one_turn_only = self._render(PROBE), False
        except DataError:
            double, one_turn_only = single, True
        if answer not in single:
            raise ModelError(
                f"chat template ({self.template_name}): an assistant turn with {answer!r} is not shown in "
                f"{single[-80:]!r}, so no answer could be scored; give another template"
            )
        head, after = single.split(answer, 1)
        between = double.partition(answer)[2].partition(PROBE[2].content)[0] or after
        self._stop = _pick_stop(after, between, [*self._special, *_other_added(tokenizer)], tokenizer.eos_token)
        self._closing = after[: after.index(self._stop) + len(self._stop)] if self._stop else after.rstrip()
        self._dropped = "" if self._stop else after[len(self._closing) :]
        self._opening = head[len(prompt) :] if head.startswith(prompt) else ""
        stop_id = tokenizer.convert_tokens_to_ids(self._stop) if self._stop else None
        self.stop_ids = tuple(dict.fromkeys(int(i) for i in (stop_id, tokenizer.eos_token_id) if i is not None))
        if not self.stop_ids:
            raise ModelError(
                f"tokenizer: it has no EOS token and the chat template ({self.template_name}) writes no end of turn, "
                "so no answer could end; set `eos_token` or give a template that ends turns with a special token"
            )
        protected = {*self._special, *([self._stop] if self._stop else [])}
        typed = sorted((text for text in protected if len(text) > 1), key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, typed)) or "(?!)")
        pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
        self.pad_id = int(pad if pad is not None else self.stop_ids[-1])
        ids = self._encode(prompt)
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise ModelError(
                f"chat template ({self.template_name}): a prompt begins with BOS (token {bos}) twice; "
                "remove one `bos_token` from the template"
            )
        self._neutral = self._encode(ANCHORS[1])
        seen = self._continued(self._response_ids(prompt, self._response_text(PROBE[:1], prompt, answer)))
        self._lead, found, self._trail = seen.partition(answer)
        if not found:  # a tokenizer that changes text, to lower case for example
            self._lead, self._trail = "", ""
        self.prefix_stable = one_turn_only or self._layout(PROBE) is not None
        self.notes = tuple(self._remarks(prompt))

    def _remarks(self, prompt: str) -> list[str]:
        notes = []
        if self.template_name == DEFAULT_TEMPLATE_NAME:
            notes.append(f"the tokenizer has no chat template; the default {DEFAULT_TEMPLATE_NAME!r} is used and saved")
        if self._stop is None:
            notes.append("the template writes no end token after an answer; EOS is added there and scored")
        if not self.prefix_stable:
            notes.append("earlier turns look different in a longer conversation; each turn is scored in its own row")
        if not self._render(PROBE[:2]).startswith(prompt):
            notes.append("the generation prompt is no prefix of an answered conversation; answers follow it directly")
        elif self._opening.strip():
            notes.append(f"the template puts {self._opening!r} before each answer; it is scored with the answer")
        return notes

    # What others ask for -------------------------------------------------------------------------------------------

    def prompt(self, messages: Conversation) -> tuple[int, ...]:
        """Ids of a conversation that waits for an answer, ending with the generation prompt.

        Equal to the tokenizer's own `apply_chat_template(..., add_generation_prompt=True)` unless somebody typed a
        control string.
        """
        return tuple(self._encode(self._prompt_text(messages)))

    def response(self, messages: Conversation, text: str) -> tuple[int, ...]:
        """Ids of the answer `text` to `messages`, through the token that ends it; all of them are to be scored."""
        prompt = self._prompt_text(messages)
        return tuple(self._response_ids(prompt, self._response_text(messages, prompt, text)))

    def document(self, text: str) -> tuple[int, ...]:
        """Ids of plain text: BOS where the tokenizer writes one, the text, and EOS. Typed control strings stay text."""
        tokenizer = self._tokenizer
        first = tokenizer.encode("a")[:1]
        begins = tuple(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else ()
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else self.stop_ids[-1]
        return (*begins, *self._ids(self._guard(text)), int(end))

    def conversation(self, messages: Conversation) -> Encoded:
        """A whole conversation in one row, every assistant turn and its end token scored; it ends with the last one.

        Raises:
            DataError: no assistant turn, or the template shows earlier turns differently later on (use `rows`).
        """
        answers = _assistant_turns(messages)
        if answers == [len(messages) - 1]:
            return self._single(messages, answers[0])
        layout = self._layout(messages)
        if layout is None:
            raise DataError(
                f"chat template ({self.template_name}): earlier turns of this conversation look different once it goes "
                "on, so it cannot be scored in one row; use `rows()`, which scores one turn a row"
            )
        text, cuts = layout
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        done = 0
        for start, end in cuts:
            ids += self._encode(text[done:start], before=text[:done])
            answer = self._response_ids(text[:start], text[start:end])
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer
            done = end
        return Encoded(tuple(ids), tuple(spans))

    def rows(self, messages: Conversation) -> tuple[Encoded, ...]:
        """The conversation as rows to score: one where the template is prefix-stable, else one for each answer."""
        answers = _assistant_turns(messages)
        if len(answers) == 1 or self._layout(messages) is None:
            return tuple(self._single(messages, turn) for turn in answers)
        return (self.conversation(messages),)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response: the inverse of `response`, up to the first token that ends it."""
        text = self._continued(ids)
        lead = self._lead
        while not lead.strip() and not text.startswith(lead):  # of blanks, as many as there are
            lead = lead[:-1]
        return text.removeprefix(lead).removesuffix(self._trail)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token where it stands, special tokens too: for showing what a model sees."""
        made = []
        for place, token in enumerate(ids):
            before = self._plain(ids[place - 1 : place], skip=False) if place else ""
            both = self._plain(ids[max(0, place - 1) : place + 1], skip=False)
            # Seen after its neighbour, because many tokenizers swallow a space at the start of a text.
            inside = bool(before) and both.startswith(before)
            made.append(both[len(before) :] if inside else self._plain([token], skip=False))
        return made

    # How it is done ------------------------------------------------------------------------------------------------

    def _plain(self, ids: Sequence[int], *, skip: bool = True) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        return str(text)

    def _continued(self, ids: Sequence[int]) -> str:
        """The text of ids up to the first end token, decoded as the continuation of a neutral text.

        Decoded alone, many tokenizers would swallow a space at the start.
        """
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        before, text = self._plain(self._neutral), self._plain([*self._neutral, *ids[:end]])
        return text[len(before) :] if text.startswith(before) else self._plain(ids[:end])

    def _guard(self, text: str) -> str:
        return self._typed.sub(lambda found: found[0][0] + BREAK + found[0][1:], text)

    def _render(self, messages: Conversation, generation: bool = False) -> str:
        turns = [{"role": message.role, "content": self._guard(message.content)} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation
            )
        except TemplateError as err:
            roles = ", ".join(message.role for message in messages) or "no message"
            raise DataError(
                f"chat template ({self.template_name}): it refuses a conversation of the turns {roles}: {err}; change "
                "the conversation, or give a template that takes it"
            ) from err
        return str(text)

    def _prompt_text(self, messages: Conversation) -> str:
        if self._last_prompt is None or self._last_prompt[0] != messages:
            self._last_prompt = (messages, self._render(messages, True))
        return self._last_prompt[1]

    def _response_text(self, messages: Conversation, prompt: str, text: str) -> str:
        whole = self._render((*messages, Message("assistant", text)))
        if not whole.startswith(prompt):
            return self._guard(text) + self._closing
        end = self._end(whole, len(prompt))
        answer = whole[len(prompt) : end]
        if text.strip() and not answer.removesuffix(self._closing).strip():
            raise DataError(
                f"chat template ({self.template_name}): it drops the answer {text[:40]!r}, so nothing would be scored; "
                "give another template or remove the row"
            )
        return answer

    def _end(self, text: str, start: int) -> int:
        """Where the answer that begins at `start` ends: after its end token, or before what the template adds to it."""
        if self._stop is None:
            return len(text.removesuffix(self._dropped))
        found = text.find(self._stop, start)
        if found < 0:
            raise DataError(
                f"chat template ({self.template_name}): it does not end this answer with {self._stop!r}, as it ends "
                f"others: {text[start:][:60]!r}; give a template that ends every answer"
            )
        return found + len(self._stop)

    def _response_ids(self, prompt: str, answer: str) -> list[int]:
        ids = self._encode(answer, before=prompt)
        return ids if self._stop else [*ids, self.stop_ids[0]]

    def _single(self, messages: Conversation, turn: int) -> Encoded:
        prompt = self.prompt(messages[:turn])
        answer = self.response(messages[:turn], messages[turn].content)
        return Encoded(prompt + answer, ((len(prompt), len(prompt) + len(answer)),))

    def _layout(self, messages: Conversation) -> tuple[str, list[tuple[int, int]]] | None:
        """The rendered text and the character range of every answer; None when the template is not prefix-stable."""
        text, cuts = self._render(messages), []
        for turn in _assistant_turns(messages):
            prompt, answered = self._render(messages[:turn], True), self._render(messages[: turn + 1])
            end = self._end(answered, len(prompt)) if answered.startswith(prompt) else 0
            # A template without end tokens has no place for EOS inside a conversation: one turn a row again.
            if not end or self._stop is None or not text.startswith(answered[:end]):
                return None
            cuts.append((len(prompt), end))
        return text, cuts

    def _tail(self, text: str) -> str:
        """The left context that decides how the next piece is encoded: a special token, or the last characters."""
        special = max((s for s in self._special if text.endswith(s)), key=len, default="")
        return special or text.rpartition(BREAK)[2][-TAIL_CHARS:]

    def _encode(self, text: str, *, before: str = "") -> list[int]:
        """Ids of `text` as the continuation of `before`, whose own ids are not touched."""
        first, *rest = text.split(BREAK)
        ids = self._continue(self._tail(before), first) if before else self._ids(first)
        for piece in rest:
            ids += self._continue("", piece)
        return ids

    def _continue(self, tail: str, text: str) -> list[int]:
        if not text:
            return []
        for anchor in (tail, *ANCHORS) if tail else ANCHORS:
            if anchor not in self._anchor_ids:
                if len(self._anchor_ids) > 10_000:
                    self._anchor_ids.clear()
                self._anchor_ids[anchor] = self._ids(anchor)
            left = self._anchor_ids[anchor]
            both = self._ids(anchor + text)
            if both[: len(left)] == left:
                return both[len(left) :]
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _assistant_turns(messages: Conversation) -> list[int]:
    turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        roles = ", ".join(message.role for message in messages) or "no message"
        raise DataError(
            f"conversation of {roles}: no assistant turn, so nothing would be scored; add the answer or remove the row"
        )
    return turns


def _special_strings(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys(text for text in [*map(str, tokenizer.all_special_tokens), *added] if text))


def _other_added(tokenizer: Tokenizer) -> list[str]:
    """Added tokens that are not flagged special: an end of turn is sometimes one of them, runs of blanks never are."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return [text for text in added if len(text.strip()) > 1]


def _choose_template(tokenizer: Tokenizer, template: str | None) -> tuple[str, str]:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if template is not None:
        return "given", template
    if own:
        return "the tokenizer's own", str(own)
    if not tokenizer.eos_token:
        raise ModelError("tokenizer: it has neither a chat template nor an EOS token; set one of them")
    adds_bos = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    return DEFAULT_TEMPLATE_NAME, ("{{ bos_token }}" if adds_bos else "") + DEFAULT_TEMPLATE


def _pick_stop(after: str, between: str, special: Sequence[str], eos: str | None) -> str | None:
    """The token that ends an answer.

    `after` is what follows the last answer of a conversation, `between` what stands between an answer and the next
    question. EOS where the template writes it in both; else the first special token that is in both (not the marker
    of the next turn, not an EOS that closes the whole text); else what closes the last answer.
    """
    last = sorted((text for text in special if text in after), key=after.index)
    for found in ([text for text in last if text in between], last):
        if found:
            return str(eos) if eos in found else found[0]
    return None
