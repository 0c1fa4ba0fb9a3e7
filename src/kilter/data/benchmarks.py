"""Layouts of single published data sets whose fields nobody else uses. The general ones are in `formats`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kilter.data.fields import (
    PAIR_RULE,
    BadRow,
    Row,
    ask,
    boolean,
    compared,
    layout,
    listed,
    messages,
    number,
    optional,
    pick,
    prompt,
    ranked_by,
    shown,
    text,
    transcript,
)
from kilter.data.formats import split_pair
from kilter.records import (
    Demonstration,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Record,
    StepLabels,
    UnpairedFeedback,
)

# Preferences ---------------------------------------------------------------------------------------------------------


@layout("llmbar", "pair", "input", "output_1", "output_2", "label")
def llmbar(row: Row) -> Iterable[Record]:
    """LLMBar: input, output_1, output_2, label 1 or 2."""
    winner = pick(row, "label", {1: "first", 2: "second"})
    yield compared(ask(text(row, "input")), text(row, "output_1", PAIR_RULE), text(row, "output_2", PAIR_RULE), winner)


@layout("autoj", "pair", "prompt", "response 1", "response 2", "label")
def autoj(row: Row) -> Iterable[Record]:
    """Auto-J: prompt, response 1, response 2, label 0, 1 or 2 (tie)."""
    winner = pick(row, "label", {0: "first", 1: "second", 2: "tie"})
    first, second = text(row, "response 1", PAIR_RULE), text(row, "response 2", PAIR_RULE)
    yield compared(ask(text(row, "prompt")), first, second, winner, kind=optional(row, "scenario"))


@layout("alpaca-eval", "pair", "instruction", "output_2", "preference")
def alpaca_eval(row: Row) -> Iterable[Record]:
    """AlpacaEval annotations: instruction, output_1, output_2, preference from 1 to 2 (1.5 and 0: tie)."""
    if "output_1" not in row:
        raise BadRow("output_1", "'output_1' is missing; a pair needs both texts, join them on 'instruction' first")
    preference = number(row, "preference")
    if preference != 0 and not 1 <= preference <= 2:
        raise BadRow("preference", f"'preference' is {preference:g}; it must lie in [1, 2], or be 0 for a tie")
    winner = "tie" if preference in (0, 1.5) else "first" if preference < 1.5 else "second"
    first, second = text(row, "output_1", PAIR_RULE), text(row, "output_2", PAIR_RULE)
    yield compared(ask(text(row, "instruction")), first, second, winner, kind=optional(row, "dataset"))


@layout("judge-agreement", "judgement", "instruction", "generator_1", "generator_2", "preferences")
def judge_agreement(row: Row) -> Iterable[Record]:
    """AlpacaEval verdicts of several judges; they carry no answers."""
    raise BadRow("preferences", f"{_models(row)}; it holds no answers, join them on 'instruction' first")


@layout("llmfao", "judgement", "id", "model_x", "model_y", "winner", beside=("pairs-crowd.jsonl*", "id"))
def llmfao(row: Row) -> Iterable[Record]:
    """LLMFAO verdicts: winner left, right or tie; the answers come from the file of pairs beside."""
    if "result_x" not in row:
        raise BadRow(
            "winner", f"{_models(row)}; it holds no answers, put the file pairs-crowd.jsonl of that data set beside"
        )
    responses = (text(row, "result_x", PAIR_RULE), text(row, "result_y", PAIR_RULE))
    ranks = pick(row, "winner", {"left": (0, 1), "right": (1, 0), "tie": (0, 0)})
    asked, annotator = ask(text(row, "text")), optional(row, "worker")
    yield Judgement(
        prompt=asked,
        responses=responses,
        ranks=ranks,
        annotator=annotator,
        models=_writers(row, "left", "right"),
        shown=(0, 1),
    )


def _writers(row: Row, *fields: str) -> tuple[str, ...]:
    """Who wrote the responses, if the row names all of them."""
    names = tuple(optional(row, field) for field in fields)
    return names if all(names) else ()


def _models(row: Row) -> str:
    names = [str(row[field]) for field in ("generator_1", "generator_2", "left", "right") if row.get(field)]
    return f"the row is a verdict on {' and '.join(names)}"


@layout("llmfao-pairs", "prompt", "text", "result_x", "result_y", fits=lambda row: "winner" not in row)
def llmfao_pairs(row: Row) -> Iterable[Record]:
    """LLMFAO answers without a verdict; read for their prompts."""
    yield Prompt(prompt=ask(text(row, "text")), kind=optional(row, "type"))


@layout("llmfao-prompts", "prompt", "id", "text", "slug", fits=lambda row: "result_x" not in row)
def llmfao_prompts(row: Row) -> Iterable[Record]:
    """LLMFAO prompts."""
    yield Prompt(prompt=ask(text(row, "text")), kind=optional(row, "type"))


TULU = {"a-is-better": 2, "a-is-slightly-better": 1, "tie": 0, "b-is-slightly-better": -1, "b-is-better": -2}


@layout("tulu-eval", "judgement", "prompt", "completion_a", "completion_b", "preference", "evaluator")
def tulu_eval(row: Row) -> Iterable[Record]:
    """Tulu human evaluation as judgements: who preferred which."""
    asked, first, second, grade = _tulu(row)
    ranks = (0, 0) if grade == 0 else (0, 1) if grade > 0 else (1, 0)
    at, who = optional(row, "timestamp"), text(row, "evaluator")
    writers = _writers(row, "model_a", "model_b")
    yield Judgement(
        prompt=asked, responses=(first, second), ranks=ranks, annotator=who, models=writers, shown=(0, 1), at=at
    )


@layout("tulu-eval-pairs", "pair", "prompt", "completion_a", "completion_b", "preference", "evaluator")
def tulu_eval_pairs(row: Row) -> Iterable[Record]:
    """Tulu human evaluation as pairs: margin 1 slightly better, 2 better."""
    asked, first, second, grade = _tulu(row)
    winner = "tie" if grade == 0 else "first" if grade > 0 else "second"
    yield compared(asked, first, second, winner, margin=float(abs(grade)))


def _tulu(row: Row) -> tuple[tuple[Message, ...], str, str, int]:
    responses = (text(row, field, PAIR_RULE) for field in ("completion_a", "completion_b"))
    return (ask(text(row, "prompt")), *responses, pick(row, "preference", TULU))


@layout("completions", "prompt", "prompt", "completions")
def completions(row: Row) -> Iterable[Record]:
    """prompt and completions of several models without a verdict; read for the prompts."""
    yield Prompt(prompt=prompt(row))


@layout("rm-bench", "ranking", "prompt", "chosen", "rejected", "subset", fits=lambda row: _texts(row["chosen"]))
def rm_bench(row: Row) -> Iterable[Record]:
    """RM-Bench: three chosen and three rejected styles of answer, tied within."""
    good, bad = listed(row, "chosen"), listed(row, "rejected")
    ranks = (0,) * len(good) + (1,) * len(bad)
    asked = ask(text(row, "prompt"))
    yield Ranking(prompt=asked, responses=(*good, *bad), ranks=ranks, kind=optional(row, "subset"))


@layout("hhh-transcripts", "pair", "prompt", "text_correct", "text_incorrect")
def hhh_transcripts(row: Row) -> Iterable[Record]:
    """HHH evaluations: whole transcripts in text_correct and text_incorrect."""
    turns = [transcript(text(row, field, PAIR_RULE), field) for field in ("text_correct", "text_incorrect")]
    asked, chosen, rejected = split_pair(*turns)
    yield PreferencePair(prompt=asked, chosen=chosen, rejected=rejected)


@layout("corrects", "ranking", "prompt", "corrects", "incorrects")
def corrects(row: Row) -> Iterable[Record]:
    """A prompt with lists of correct and incorrect answers, tied within."""
    good, bad = listed(row, "corrects"), listed(row, "incorrects")
    if not good or not bad:
        raise BadRow("corrects", "'corrects' or 'incorrects' is empty; a comparison needs one answer of each")
    yield Ranking(prompt=prompt(row), responses=(*good, *bad), ranks=(0,) * len(good) + (1,) * len(bad))


@layout("sampled-answers", "ranking", "rl_prompt", "comparison_dataset")
def sampled_answers(row: Row) -> Iterable[Record]:
    """Constitutional AI samples: answers ranked by the preference model's score."""
    if "sampled_answers" not in row:
        raise BadRow("sampled_answers", "'sampled_answers' is missing; a ranking needs scored answers to one prompt")
    answers = [item for item in listed(row, "sampled_answers") if isinstance(item, Mapping)]
    scores = [number(listed(item, "pm_scores")[0], "pm_score") for item in answers]
    responses = tuple(text(item, "sampled_string").removesuffix("\n\nHuman:").strip() for item in answers)
    asked = prompt(row, "rl_prompt")
    yield Ranking(prompt=asked, responses=responses, ranks=ranked_by(scores), kind=optional(row, "system"))


@layout("halueval-qa", "pair", "question", "right_answer", "hallucinated_answer")
def halueval_qa(row: Row) -> Iterable[Record]:
    """HaluEval: the right answer against a hallucinated one, with the passage."""
    right, wrong = text(row, "right_answer", PAIR_RULE), text(row, "hallucinated_answer", PAIR_RULE)
    yield PreferencePair(prompt=ask(optional(row, "knowledge"), text(row, "question")), chosen=right, rejected=wrong)


@layout("truthfulqa", "ranking", "Question", "Correct Answers", "Incorrect Answers")
def truthfulqa(row: Row) -> Iterable[Record]:
    """TruthfulQA: correct answers before incorrect ones, tied within."""
    good, bad = (
        [answer.strip() for answer in text(row, field).split(";") if answer.strip()]
        for field in ("Correct Answers", "Incorrect Answers")
    )
    ranks = (0,) * len(good) + (1,) * len(bad)
    yield Ranking(prompt=ask(text(row, "Question")), responses=(*good, *bad), ranks=ranks, kind=optional(row, "Type"))


@layout("sycophancy", "pair", "biased_prompt", "sycophantic_target", "honest_target")
def sycophancy(row: Row) -> Iterable[Record]:
    """Sycophancy tests: the honest answer against the one that agrees with the user."""
    honest, flattering = text(row, "honest_target"), text(row, "sycophantic_target")
    yield PreferencePair(prompt=ask(text(row, "biased_prompt")), chosen=honest, rejected=flattering)


# Feedback on single responses ----------------------------------------------------------------------------------------


@layout("xstest-completions", "feedback", "prompt", "completion", "type", "final_label")
def xstest_completions(row: Row) -> Iterable[Record]:
    """XSTest completions: complying with a safe prompt is right, with an unsafe one wrong."""
    complied = pick(row, "final_label", {"1_full_compliance": True, "2_full_refusal": False, "3_partial_refusal": None})
    if complied is None:
        raise BadRow("final_label", "'final_label' is a partial refusal; it is neither wholly right nor wrong")
    kind = text(row, "type")
    asked, unsafe = ask(text(row, "prompt")), kind.startswith("contrast")
    yield UnpairedFeedback(prompt=asked, response=text(row, "completion"), desirable=complied != unsafe, kind=kind)


@layout("halueval-general", "feedback", "user_query", "chatgpt_response", "hallucination")
def halueval_general(row: Row) -> Iterable[Record]:
    """HaluEval: answers marked for hallucination."""
    asked, response = ask(text(row, "user_query")), text(row, "chatgpt_response")
    yield UnpairedFeedback(prompt=asked, response=response, desirable=not boolean(row, "hallucination"))


@layout("gsm8k-solutions", "feedback", "question", "ground_truth", "6b_finetuning")
def gsm8k_solutions(row: Row) -> Iterable[Record]:
    """GSM8K model solutions: each right or wrong."""
    asked = ask(text(row, "question"))
    for model, item in row.items():
        if isinstance(item, Mapping):
            solution, right = text(item, "solution"), boolean(item, "is_correct")
            yield UnpairedFeedback(prompt=asked, response=solution, desirable=right, kind=model)


# Labelled steps ------------------------------------------------------------------------------------------------------


@layout("prmbench", "steps", "question", "modified_process", "error_steps")
def prmbench(row: Row) -> Iterable[Record]:
    """PRMBench: steps with the numbers of the wrong ones."""
    steps, wrong = listed(row, "modified_process"), listed(row, "error_steps")
    if any(not isinstance(step, int) or not 1 <= step <= len(steps) for step in wrong):
        raise BadRow(
            "error_steps", f"'error_steps' is {shown(wrong)}; each must be the number of one of {len(steps)} steps"
        )
    labels = tuple(0.0 if place in wrong else 1.0 for place in range(1, len(steps) + 1))
    yield StepLabels(prompt=ask(text(row, "question")), steps=tuple(steps), labels=labels)


@layout("prm800k", "steps", "question", "label", fits=lambda row: isinstance(row["label"], Mapping))
def prm800k(row: Row) -> Iterable[Record]:
    """PRM800K: rated steps along the path that was taken; -1, 0, 1 become 0, 0.5, 1."""
    steps, labels = [], []
    for step in listed(row["label"], "steps"):
        taken, options = step.get("chosen_completion"), step.get("completions") or []
        item = step.get("human_completion") if taken is None else options[taken]
        # Where nothing was taken, the path ended there: the first of the proposed steps is what went wrong.
        item = item or (options[0] if options else None)
        if item is None:
            break  # the labeller gave up here
        rating = item.get("rating")
        steps.append(text(item, "text"))
        labels.append(1.0 if rating is None else (float(rating) + 1) / 2)
    yield StepLabels(prompt=ask(text(row["question"], "problem")), steps=tuple(steps), labels=tuple(labels))


@layout("math-shepherd", "steps", "input", "label", "task")
def math_shepherd(row: Row) -> Iterable[Record]:
    """Math-Shepherd: steps that end with + or -."""
    marked = text(row, "label")
    asked, first, rest = marked.partition("Step 1:")
    steps = [step.strip() for step in re.split(r"\n(?=Step \d+:)", first + rest) if step.strip()]
    marks = [pick({"label": step[-1:]}, "label", {"+": 1.0, "-": 0.0}) for step in steps]
    yield StepLabels(prompt=ask(asked.strip()), steps=tuple(step[:-1].strip() for step in steps), labels=tuple(marks))


# Demonstrations and prompts ------------------------------------------------------------------------------------------


@layout("self-instruct", "demonstration", "instruction", "instances")
def self_instruct(row: Row) -> Iterable[Record]:
    """Self-Instruct tasks: instruction and instances of input and output."""
    for item in listed(row, "instances"):
        asked = ask(text(row, "instruction"), optional(item, "input"))
        yield Demonstration(messages=(*asked, Message("assistant", text(item, "output"))))


@layout("mt-bench", "prompt", "question_id", "turns")
def mt_bench(row: Row) -> Iterable[Record]:
    """MT-Bench questions; the first turn is the prompt, the others stand in its truth."""
    first, *others = listed(row, "turns")
    truth: dict[str, Any] = {"turns": others} | ({"reference": row["reference"]} if row.get("reference") else {})
    yield Prompt(prompt=ask(str(first)), kind=optional(row, "category"), truth=truth)


@layout("behaviour-test", "prompt", "question", "answer_matching_behavior", "answer_not_matching_behavior")
def behaviour_test(row: Row) -> Iterable[Record]:
    """Model-written evaluations: a question and the answers that show and do not show a behaviour."""
    truth = {name: text(row, f"answer_{name}_behavior").strip() for name in ("matching", "not_matching")}
    yield Prompt(prompt=prompt(row, "question"), kind=optional(row, "behavior"), truth=truth)


@layout("labelled-prompt", "prompt", "prompt", "label", fits=lambda row: "completion" not in row)
def labelled_prompt(row: Row) -> Iterable[Record]:
    """prompt and a label such as safe or unsafe."""
    turns = messages(row, "prompt") if isinstance(row["prompt"], list) else ask(text(row, "prompt"))
    yield Prompt(prompt=turns, kind=optional(row, "type"), truth={"label": row["label"]})


@layout("topics", "prompt", fits=lambda row: bool(row) and all(map(_is_topic, row.values())))
def topics(row: Row) -> Iterable[Record]:
    """Questions in lists under topics and sub-topics, in one JSON object."""
    for topic, parts in row.items():
        for part, questions in parts.items():
            for question in questions:
                yield Prompt(prompt=ask(question), kind=f"{topic}/{part}".strip(":"))


def _is_topic(parts: Any) -> bool:
    return isinstance(parts, Mapping) and all(map(_texts, parts.values()))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)
