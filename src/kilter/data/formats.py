"""The layouts that people's preference and demonstration files have. Layouts of single benchmarks: `benchmarks`.

A layout is one function under `@layout(name, kind of record, fields...)`. Recognition goes by the fields: the layout
with the most of them that fits is taken, so a more particular one goes before a general one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kilter.data.fields import (
    PAIR_RULE,
    BadRow,
    Row,
    answer,
    ask,
    boolean,
    is_transcript,
    layout,
    listed,
    message,
    messages,
    number,
    optional,
    prompt,
    ranked_by,
    shown,
    text,
    transcript,
)
from kilter.records import (
    RECORDS,
    Conversation,
    Demonstration,
    Document,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    UnpairedFeedback,
)

PROMPT_FIELDS: tuple[str, ...] = (
    *("prompt", "instruction", "question", "query", "goal", "Goal", "Behavior", "behavior", "user_query"),
    *("forbidden_prompt", "prompts_final", "Question", "biased_prompt", "initial_user_message"),
)
KIND_FIELDS = ("kind", "type", "category", "Category", "SemanticCategory", "subset", "set", "harm_area", "domain")


OWN = "kilter-"
"""How the names of our own layouts begin."""


def kind_of(row: Row) -> str:
    """What groups the rows of a file, under one of the names in use."""
    return next((row[field] for field in KIND_FIELDS if isinstance(row.get(field), str)), "")


def own_record(kind: str, row: Row) -> list[Record]:
    """A row that Kilter wrote."""
    try:
        return [RECORDS[kind].from_dict(row)]
    except KeyError as err:
        raise BadRow(str(err.args[0]), f"{err.args[0]!r} is missing from a turn; each has role and content") from err
    except (TypeError, ValueError) as err:
        reason = str(err).replace(f"{RECORDS[kind].__name__}.__init__() ", "")
        field = reason.split("'")[1] if "'" in reason else ""
        raise BadRow(field, f"{reason}; a {kind} record needs it") from err


def _register_own() -> None:
    for kind in RECORDS:

        def convert(row: Row, kind: str = kind) -> Iterable[Record]:
            return own_record(kind, row)

        convert.__doc__ = f"what Kilter writes: {{'type': '{kind}', ...}}"
        layout(f"{OWN}{kind}", kind, "type", fits=lambda row, kind=kind: row["type"] == kind)(convert)  # type: ignore[misc]


_register_own()


def margin_of(row: Row) -> float | None:
    """How much better the chosen response is, where the file says so."""
    if row.get("margin") is not None:
        return number(row, "margin")
    for chosen, rejected in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return number(row, chosen) - number(row, rejected)
    return None


def split_pair(first: Conversation, second: Conversation) -> tuple[Conversation, str, str]:
    """Two conversations that part at their last turn -> the common prompt and both answers."""
    if not first or not second or first[:-1] != second[:-1]:
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
        raise BadRow(
            "rejected",
            f"'chosen' and 'rejected' part at turn {same + 1} of {len(first)} and {len(second)}; they must differ in "
            "their last turn only",
        )
    for field, turns in (("chosen", first), ("rejected", second)):
        if turns[-1].role != "assistant":
            raise BadRow(field, f"{field!r} ends with a {turns[-1].role} turn; it must end with an answer")
    return first[:-1], first[-1].content, second[-1].content


@layout("hh", "pair", "chosen", "rejected", fits=lambda row: is_transcript(row["chosen"]) and "prompt" not in row)
def hh(row: Row) -> Iterable[Record]:
    """HH-RLHF: whole transcripts 'Human: ... Assistant: ...' in chosen and rejected."""
    turns = [transcript(text(row, field, PAIR_RULE), field) for field in ("chosen", "rejected")]
    asked, chosen, rejected = split_pair(*turns)
    yield PreferencePair(prompt=asked, chosen=chosen, rejected=rejected)


@layout("trl-implicit", "pair", "chosen", "rejected", fits=lambda row: _is_whole(row["chosen"]))
def trl_implicit(row: Row) -> Iterable[Record]:
    """TRL and UltraFeedback (binarized): turns in chosen and rejected, the prompt among them."""
    asked, chosen, rejected = split_pair(messages(row, "chosen"), messages(row, "rejected"))
    yield PreferencePair(prompt=asked, chosen=chosen, rejected=rejected, margin=margin_of(row), kind=kind_of(row))


@layout("trl-pair", "pair", "prompt", "chosen", "rejected", fits=lambda row: _is_answer(row["chosen"]))
def trl_pair(row: Row) -> Iterable[Record]:
    """TRL: prompt, chosen, rejected; each a text or a list of turns."""
    yield PreferencePair(
        prompt=prompt(row),
        chosen=answer(row, "chosen", PAIR_RULE),
        rejected=answer(row, "rejected", PAIR_RULE),
        margin=margin_of(row),
        kind=kind_of(row),
    )


@layout("sharegpt-pair", "pair", "conversations", "chosen", "rejected")
def sharegpt_pair(row: Row) -> Iterable[Record]:
    """LLaMA-Factory: conversations (from, value), chosen, rejected."""
    asked = _with_system(row, messages(row, "conversations"))
    chosen, rejected = answer(row, "chosen", PAIR_RULE), answer(row, "rejected", PAIR_RULE)
    yield PreferencePair(prompt=asked, chosen=chosen, rejected=rejected)


@layout("alpaca-pair", "pair", "instruction", "chosen", "rejected")
def alpaca_pair(row: Row) -> Iterable[Record]:
    """Alpaca with a preference: instruction, input, chosen, rejected."""
    chosen, rejected = answer(row, "chosen", PAIR_RULE), answer(row, "rejected", PAIR_RULE)
    yield PreferencePair(prompt=_instruction(row), chosen=chosen, rejected=rejected, margin=margin_of(row))


@layout("question-pair", "pair", "question", "chosen", "rejected")
def question_pair(row: Row) -> Iterable[Record]:
    """Orca pairs: system, question, chosen, rejected."""
    chosen, rejected = answer(row, "chosen", PAIR_RULE), answer(row, "rejected", PAIR_RULE)
    asked = ask(text(row, "question"), system=optional(row, "system"))
    yield PreferencePair(prompt=asked, chosen=chosen, rejected=rejected)


@layout("kto-messages", "feedback", "messages", "label")
def kto_messages(row: Row) -> Iterable[Record]:
    """LLaMA-Factory KTO: messages and a label."""
    turns = messages(row, "messages")
    if not turns or turns[-1].role != "assistant":
        raise BadRow("messages", "'messages' does not end with an answer; the label is about the last turn")
    yield UnpairedFeedback(prompt=turns[:-1], response=turns[-1].content, desirable=boolean(row, "label"))


@layout("trl-unpaired", "feedback", "prompt", "completion", "label")
def trl_unpaired(row: Row) -> Iterable[Record]:
    """TRL KTO: prompt, completion, label."""
    yield UnpairedFeedback(
        prompt=prompt(row), response=answer(row, "completion"), desirable=boolean(row, "label"), kind=kind_of(row)
    )


@layout("ultrafeedback", "ranking", "instruction", "completions")
def ultrafeedback(row: Row) -> Iterable[Record]:
    """UltraFeedback (full): instruction and completions with scores."""
    answers = [item for item in listed(row, "completions") if isinstance(item, Mapping)]
    field = next((f for f in ("overall_score", "fine-grained_score") if all(f in item for item in answers)), "")
    scores = [number(item, field) if field else _mean_rating(item) for item in answers]
    responses = tuple(text(item, "response") for item in answers)
    yield Ranking(prompt=ask(text(row, "instruction")), responses=responses, ranks=ranked_by(scores))


def _mean_rating(item: Row) -> float:
    marks = item.get("annotations")
    ratings = [mark.get("Rating") for mark in marks.values()] if isinstance(marks, Mapping) else []
    found = [number({"Rating": rating}, "Rating") for rating in ratings if str(rating).replace(".", "").isdigit()]
    if not found:
        raise BadRow("completions", f"'completions' holds {shown(item)}; each needs overall_score or rated annotations")
    return sum(found) / len(found)


@layout("ranked-replies", "ranking", "messages", "ranked_replies")
def ranked_replies(row: Row) -> Iterable[Record]:
    """Rankings: messages and ranked_replies, the best first."""
    replies = tuple(listed(row, "ranked_replies"))
    yield Ranking(prompt=messages(row, "messages"), responses=replies, ranks=tuple(range(len(replies))))


@layout("ranked-responses", "ranking", "prompt", "responses")
def ranked_responses(row: Row) -> Iterable[Record]:
    """Rankings: prompt, responses and ranks (0 best) or scores."""
    responses = tuple(listed(row, "responses"))
    if "ranks" in row:
        ranks = tuple(int(number({"ranks": rank}, "ranks")) for rank in listed(row, "ranks"))
    elif "scores" in row:
        ranks = ranked_by([number({"scores": score}, "scores") for score in listed(row, "scores")])
    else:
        raise BadRow("ranks", "'ranks' is missing; a ranking needs ranks (0 best) or scores for its responses")
    yield Ranking(prompt=prompt(row), responses=responses, ranks=ranks, kind=kind_of(row))


@layout("oasst-tree", "ranking", "message_tree_id", "prompt", fits=lambda row: isinstance(row["prompt"], Mapping))
def oasst_tree(row: Row) -> Iterable[Record]:
    """OpenAssistant trees: every turn with two or more ranked replies is a ranking."""
    waiting: list[tuple[Conversation, Row]] = [((), row["prompt"])]
    found = False
    while waiting:
        before, node = waiting.pop()
        here = (*before, message({"role": node.get("role"), "content": text(node, "text")}, "prompt"))
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, Mapping)]
        ranked = sorted((r for r in replies if isinstance(r.get("rank"), int)), key=lambda reply: int(reply["rank"]))
        if len(ranked) > 1 and here[-1].role == "user":
            found = True
            responses = tuple(text(reply, "text") for reply in ranked)
            yield Ranking(prompt=here, responses=responses, ranks=tuple(int(reply["rank"]) for reply in ranked))
        waiting += [(here, reply) for reply in reversed(replies)]
    if not found:
        raise BadRow("prompt", "the tree has no turn with two ranked replies; there is nothing to compare")


@layout("openai", "demonstration", "messages")
def openai(row: Row) -> Iterable[Record]:
    """OpenAI chat: messages of role and content."""
    yield Demonstration(messages=messages(row, "messages"))


@layout("sharegpt", "demonstration", "conversations")
def sharegpt(row: Row) -> Iterable[Record]:
    """ShareGPT: conversations of from and value."""
    yield Demonstration(messages=_with_system(row, messages(row, "conversations")))


@layout("transcript", "demonstration", "text", fits=lambda row: is_transcript(row["text"]))
def one_transcript(row: Row) -> Iterable[Record]:
    """One transcript 'Human: ... Assistant: ...' in text."""
    yield Demonstration(messages=transcript(text(row, "text"), "text"))


@layout("text", "document", "text", fits=lambda row: not is_transcript(row["text"]))
def plain_text(row: Row) -> Iterable[Record]:
    """Plain text without roles, in text."""
    yield Document(text=text(row, "text"))


@layout("trl-completion", "demonstration", "prompt", "completion")
def trl_completion(row: Row) -> Iterable[Record]:
    """TRL: prompt and completion, texts or turns."""
    completion = row["completion"]
    turns = messages(row, "completion") if isinstance(completion, list) else _said(text(row, "completion"))
    yield Demonstration(messages=prompt(row) + turns)


@layout("prompt-response", "demonstration", "prompt", "response", fits=lambda row: "instruction" not in row)
def prompt_response(row: Row) -> Iterable[Record]:
    """prompt and response."""
    yield Demonstration(messages=prompt(row) + _said(answer(row, "response")))


@layout("alpaca", "demonstration", "instruction", "output")
def alpaca(row: Row) -> Iterable[Record]:
    """Alpaca: instruction, input, output."""
    yield Demonstration(messages=_instruction(row) + _said(text(row, "output")))


@layout("dolly", "demonstration", "instruction", "response")
def dolly(row: Row) -> Iterable[Record]:
    """Dolly and GPTeacher: instruction, context or input, response."""
    yield Demonstration(messages=_instruction(row) + _said(text(row, "response")))


@layout("question-answer", "demonstration", "question", "answer")
def question_answer(row: Row) -> Iterable[Record]:
    """GSM8K and its like: question and answer."""
    yield Demonstration(messages=ask(text(row, "question")) + _said(text(row, "answer")))


def _register_prompts() -> None:
    for field in PROMPT_FIELDS:

        def convert(row: Row, field: str = field) -> Iterable[Record]:
            return [Prompt(prompt=prompt(row, field), kind=kind_of(row), truth=_truth(row))]

        convert.__doc__ = f"prompts without answers, in {field!r}; 'truth' is kept for verifiers"
        layout(f"prompts-{field}", "prompt", field)(convert)


_register_prompts()


def _truth(row: Row) -> Mapping[str, Any]:
    """What a verifier needs: the mapping in `truth`, or the one value there as its `answer`."""
    value = row.get("truth")
    return value if isinstance(value, Mapping) else {} if value in (None, "") else {"answer": value}


def _is_whole(value: Any) -> bool:
    """A conversation from its first turn on, not only the answer: it does not begin with the assistant."""
    first = value[0] if isinstance(value, list) and len(value) > 1 else None
    return isinstance(first, Mapping) and message(first, "chosen").role != "assistant"


def _is_answer(value: Any) -> bool:
    """One answer: anything but a whole conversation or a list of several texts."""
    return not _is_whole(value) and not (isinstance(value, list) and value and isinstance(value[0], str))


def _said(content: str) -> Conversation:
    return (Message("assistant", content),)


def _with_system(row: Row, turns: Conversation) -> Conversation:
    system = optional(row, "system")
    return (Message("system", system), *turns) if system.strip() and turns[:1] and turns[0].role != "system" else turns


def _instruction(row: Row) -> Conversation:
    given = optional(row, "input") or optional(row, "context")
    return ask(text(row, "instruction"), given, system=optional(row, "system"))
