"""One row of every public layout, recognised by its content, and the record it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kilter.data import layouts, read
from kilter.records import (
    Conversation,
    Demonstration,
    Document,
    Judgement,
    Message,
    PreferencePair,
    Prompt,
    Ranking,
    Rating,
    Record,
    StepLabels,
    UnpairedFeedback,
)


def said(*contents: str, system: str = "") -> Conversation:
    turns = tuple(Message("assistant" if place % 2 else "user", text) for place, text in enumerate(contents))
    return (Message("system", system), *turns) if system else turns


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pair(*prompt: str, system: str = "", **extra: Any) -> PreferencePair:
    return PreferencePair(prompt=said(*prompt, system=system), **{"chosen": "good", "rejected": "bad"} | extra)


def tree(text: str, role: str = "prompter", rank: int | None = None, replies: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


HUMAN = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
EXAMPLES: dict[str, tuple[dict[str, Any], list[Record]]] = {
    "hh": ({"chosen": f"{HUMAN} good", "rejected": f"{HUMAN} bad"}, [pair("Hi", "Yes?", "Why?")]),
    "trl-implicit": (
        {"chosen": [user("Hi"), assistant("good")], "rejected": [user("Hi"), assistant("bad")], "score_chosen": 3.0}
        | {"score_rejected": 1, "prompt": "Hi"},
        [pair("Hi", margin=2.0)],
    ),
    "trl-pair": (
        {"prompt": [user("Hi")], "chosen": [assistant("good")], "rejected": [assistant("bad")], "margin": 0.5},
        [pair("Hi", margin=0.5)],
    ),
    "sharegpt-pair": (
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]}
        | {"chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
        [pair("Hi", system="S")],
    ),
    "alpaca-pair": (
        {"instruction": "Add", "input": "1 2", "output": "3", "chosen": "good", "rejected": "bad"},
        [pair("Add\n\n1 2")],
    ),
    "question-pair": ({"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"}, [pair("Q", system="S")]),
    "kto-messages": (
        {"messages": [user("Hi"), assistant("good")], "label": False},
        [UnpairedFeedback(prompt=said("Hi"), response="good", desirable=False)],
    ),
    "trl-unpaired": (
        {"prompt": "Hi", "completion": "good", "label": 1},
        [UnpairedFeedback(prompt=said("Hi"), response="good", desirable=True)],
    ),
    "ultrafeedback": (
        {
            "instruction": "Q",
            "completions": [{"response": "a", "overall_score": 4}, {"response": "b", "overall_score": 9}],
        },
        [Ranking(prompt=said("Q"), responses=("a", "b"), ranks=(1, 0))],
    ),
    "ranked-replies": (
        {"messages": [user("Hi")], "ranked_replies": ["a", "b"], "synthetic": [True, False]},
        [Ranking(prompt=said("Hi"), responses=("a", "b"), ranks=(0, 1))],
    ),
    "ranked-responses": (
        {"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [0.5, 2, 0.5]},
        [Ranking(prompt=said("Hi"), responses=("a", "b", "c"), ranks=(1, 0, 1))],
    ),
    "oasst-tree": (
        {
            "message_tree_id": "t",
            "prompt": tree(
                "Hi",
                replies=(
                    tree("b", "assistant", 1),
                    tree(
                        "a",
                        "assistant",
                        0,
                        (tree("So", replies=(tree("x", "assistant", 0), tree("y", "assistant", 1))),),
                    ),
                    tree("unranked", "assistant"),
                ),
            ),
        },
        [
            Ranking(prompt=said("Hi"), responses=("a", "b"), ranks=(0, 1)),
            Ranking(prompt=said("Hi", "a", "So"), responses=("x", "y"), ranks=(0, 1)),
        ],
    ),
    "openai": (
        {"messages": [{"role": "developer", "content": "S"}, user("Hi"), assistant("good")]},
        [Demonstration(messages=said("Hi", "good", system="S"))],
    ),
    "sharegpt": (
        {"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "good"}]},
        [Demonstration(messages=said("Hi", "good", system="S"))],
    ),
    "text": ({"text": "Once upon a time."}, [Document(text="Once upon a time.")]),
    "transcript": ({"text": "Human: Hi\n\nAssistant: good"}, [Demonstration(messages=said("Hi", "good"))]),
    "trl-completion": (
        {"prompt": [user("Hi")], "completion": [assistant("good"), user("So"), assistant("on")]},
        [Demonstration(messages=said("Hi", "good", "So", "on"))],
    ),
    "prompt-response": (
        {"prompt": HUMAN, "response": "good"},
        [Demonstration(messages=said("Hi", "Yes?", "Why?", "good"))],
    ),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "good"}, [Demonstration(messages=said("Hi", "good"))]),
    "dolly": (
        {"instruction": "Sum", "context": "Text", "response": "good"},
        [Demonstration(messages=said("Sum\n\nText", "good"))],
    ),
    "question-answer": ({"question": "Q", "answer": "good"}, [Demonstration(messages=said("Q", "good"))]),
    "llmbar": ({"input": "Q", "output_1": "bad", "output_2": "good", "label": 2}, [pair("Q")]),
    "autoj": (
        {"scenario": "s", "label": 2, "prompt": "Q", "response 1": "good", "response 2": "bad"},
        [pair("Q", tie=True, kind="s")],
    ),
    "alpaca-eval": (
        {"instruction": "Q", "output_1": "bad", "output_2": "good", "preference": 1.9, "generator_1": "g"},
        [pair("Q")],
    ),
    "llmfao": (
        {"id": 1, "text": "Q", "result_x": "a", "result_y": "b", "winner": "right", "worker": "7"}
        | {"model_x": 1, "model_y": 2, "left": "m", "right": "n"},
        [
            Judgement(
                prompt=said("Q"),
                responses=("a", "b"),
                ranks=(1, 0),
                annotator="7",
                models=("m", "n"),
                shown=(0, 1),
            )
        ],
    ),
    "llmfao-pairs": (
        {"id": 1, "text": "Q", "slug": "s", "type": "t", "result_x": "a", "result_y": "b"},
        [Prompt(prompt=said("Q"), kind="t")],
    ),
    "llmfao-prompts": ({"id": 1, "text": "Q", "type": "t", "slug": "s"}, [Prompt(prompt=said("Q"), kind="t")]),
    "tulu-eval": (
        {"prompt": "Q", "completion_a": "a", "completion_b": "b", "preference": "b-is-better", "evaluator": "e"},
        [Judgement(prompt=said("Q"), responses=("a", "b"), ranks=(1, 0), annotator="e", shown=(0, 1))],
    ),
    "completions": ({"prompt": "Q", "completions": [{"model": "m", "completion": "a"}]}, [Prompt(prompt=said("Q"))]),
    "rm-bench": (
        {"prompt": "Q", "subset": "s", "chosen": ["a", "b"], "rejected": ["c", "d"]},
        [Ranking(prompt=said("Q"), responses=("a", "b", "c", "d"), ranks=(0, 0, 1, 1), kind="s")],
    ),
    "hhh-transcripts": (
        {"prompt": "Which?", "text_correct": f"{HUMAN} good", "text_incorrect": f"{HUMAN} bad", "corrects": ["(A)"]}
        | {"incorrects": ["(B)"]},
        [pair("Hi", "Yes?", "Why?")],
    ),
    "corrects": (
        {"prompt": HUMAN, "corrects": ["a"], "incorrects": ["b", "c"]},
        [Ranking(prompt=said("Hi", "Yes?", "Why?"), responses=("a", "b", "c"), ranks=(0, 1, 1))],
    ),
    "sampled-answers": (
        {"system": "s", "rl_prompt": HUMAN, "comparison_dataset": "d"}
        | {
            "sampled_answers": [
                {"sampled_string": f" {text}\n\nHuman:", "pm_scores": [{"pm_score": value}]}
                for text, value in (("a", -1.5), ("b", 0.5))
            ]
        },
        [Ranking(prompt=said("Hi", "Yes?", "Why?"), responses=("a", "b"), ranks=(1, 0), kind="s")],
    ),
    "halueval-qa": (
        {"knowledge": "K", "question": "Q", "right_answer": "good", "hallucinated_answer": "bad"},
        [pair("K\n\nQ")],
    ),
    "truthfulqa": (
        {"Type": "t", "Question": "Q", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": "c"},
        [Ranking(prompt=said("Q"), responses=("a", "b", "c"), ranks=(0, 0, 1), kind="t")],
    ),
    "sycophancy": (
        {"neutral_prompt": "N", "biased_prompt": "Q", "sycophantic_target": "bad", "honest_target": "good"},
        [pair("Q")],
    ),
    "xstest-completions": (
        {"prompt": "Q", "completion": "No", "type": "contrast_homonyms", "final_label": "2_full_refusal", "id": "1"},
        [UnpairedFeedback(prompt=said("Q"), response="No", desirable=True, kind="contrast_homonyms")],
    ),
    "halueval-general": (
        {"user_query": "Q", "chatgpt_response": "a", "hallucination": "yes", "hallucination_spans": []},
        [UnpairedFeedback(prompt=said("Q"), response="a", desirable=False)],
    ),
    "gsm8k-solutions": (
        {"question": "Q", "ground_truth": "4", "6b_finetuning": {"solution": "a", "is_correct": False}}
        | {"175b_verification": {"solution": "b", "is_correct": True}},
        [
            UnpairedFeedback(prompt=said("Q"), response="a", desirable=False, kind="6b_finetuning"),
            UnpairedFeedback(prompt=said("Q"), response="b", desirable=True, kind="175b_verification"),
        ],
    ),
    "prmbench": (
        {"question": "Q", "modified_process": ["a", "b", "c"], "error_steps": [2]},
        [StepLabels(prompt=said("Q"), steps=("a", "b", "c"), labels=(1.0, 0.0, 1.0))],
    ),
    "prm800k": (
        {
            "question": {"problem": "Q"},
            "label": {
                "steps": [
                    {"completions": [{"text": "x", "rating": -1}, {"text": "a", "rating": 1}], "chosen_completion": 1},
                    {"completions": [], "human_completion": {"text": "b", "rating": None}, "chosen_completion": None},
                    {"completions": [{"text": "c", "rating": 0}], "human_completion": None, "chosen_completion": 0},
                    {"completions": [{"text": "d", "rating": -1}], "human_completion": None, "chosen_completion": None},
                ]
            },
        },
        [StepLabels(prompt=said("Q"), steps=("a", "b", "c", "d"), labels=(1.0, 1.0, 0.5, 0.0))],
    ),
    "math-shepherd": (
        {
            "input": "Q? Step 1: a \u043a\u0438\nStep 2: b \u043a\u0438",
            "label": "Q? Step 1: a +\nStep 2: b -",
            "task": "GSM8K",
        },
        [StepLabels(prompt=said("Q?"), steps=("Step 1: a", "Step 2: b"), labels=(1.0, 0.0))],
    ),
    "self-instruct": (
        {"id": "1", "instruction": "Add", "instances": [{"input": "", "output": "a"}, {"input": "1", "output": "b"}]},
        [Demonstration(messages=said("Add", "a")), Demonstration(messages=said("Add\n\n1", "b"))],
    ),
    "mt-bench": (
        {"question_id": 1, "category": "c", "turns": ["Q", "And?"]},
        [Prompt(prompt=said("Q"), kind="c", truth={"turns": ["And?"]})],
    ),
    "behaviour-test": (
        {"behavior": "b", "question": "Q", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"},
        [Prompt(prompt=said("Q"), kind="b", truth={"matching": "(A)", "not_matching": "(B)"})],
    ),
    "labelled-prompt": (
        {"id": "1", "prompt": "Q", "type": "t", "label": "safe"},
        [Prompt(prompt=said("Q"), kind="t", truth={"label": "safe"})],
    ),
    "topics": ({"T": {"P:": ["Q", "R"]}}, [Prompt(prompt=said("Q"), kind="T/P"), Prompt(prompt=said("R"), kind="T/P")]),
    "prompts-goal": ({"goal": "Q", "target": "Sure"}, [Prompt(prompt=said("Q"))]),
    "prompts-prompt": ({"prompt": HUMAN, "category": "c"}, [Prompt(prompt=said("Hi", "Yes?", "Why?"), kind="c")]),
    "prompts-query": ({"query": "Q", "truth": {"sum": 5}}, [Prompt(prompt=said("Q"), truth={"sum": 5})]),
    "prompts-user_query": ({"user_query": "Q", "truth": 0}, [Prompt(prompt=said("Q"), truth={"answer": 0})]),
}
ELSEWHERE = {"judge-agreement", "tulu-eval-pairs"}


@pytest.mark.parametrize("record", ["pair", "ranking"])
def test_what_holds_of_a_record_holds_of_what_is_made_of_it(tmp_path: Path, record: str) -> None:
    said_of = {"weight": 0.5, "group": "farmers", "kind": "k", "source": "s"}
    texts: dict[str, Any] = {"prompt": said("Q"), "responses": ("a", "b")}
    made = {
        "pair": [PreferencePair(prompt=said("Q"), chosen="b", rejected="a", **said_of)],
        "ranking": [Ranking(**texts, ranks=(1, 0), **said_of)],
    }[record]
    path = tmp_path / "own.jsonl"
    for judged in (
        Judgement(**texts, ranks=(1, 0), annotator="w", **said_of),
        Rating(**texts, values=(1.5, 4), **said_of),
    ):
        path.write_text(json.dumps(judged.to_dict()) + "\n")
        assert read(path, record=record).records == made


@pytest.mark.parametrize("name", EXAMPLES)
def test_layout(tmp_path: Path, name: str) -> None:
    row, expected = EXAMPLES[name]
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(row) + "\n")
    result = read(path)
    assert result.format == name
    assert [record.to_dict() for record in result.records] == [
        r.to_dict() | {"source": f"{path.name}:1"} for r in expected
    ]
    assert read(path, format=name).records == result.records


def test_answers_are_taken_from_a_file_beside(tmp_path: Path) -> None:
    verdicts = tmp_path / "verdicts.csv"
    verdicts.write_text("id,model_x,model_y,worker,winner\n1,3,4,w,left\n2,3,4,w,tie\n")
    pairs = tmp_path / "pairs-crowd.jsonl"
    pairs.write_text(
        json.dumps({"id": 1, "text": "Q", "type": "t", "slug": "s", "result_x": "a", "result_y": "b"}) + "\n"
    )
    result = read(verdicts, skip_bad=True)
    expected = Judgement(prompt=said("Q"), responses=("a", "b"), ranks=(0, 1), annotator="w", shown=(0, 1))
    assert [record.to_dict() for record in result.records] == [expected.to_dict() | {"source": "verdicts.csv:2"}]
    assert [skip.line for skip in result.skipped] == [3] and list(result.lines) == [2]


def test_a_demonstration_read_as_a_prompt_has_its_answer_as_truth(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps({"question": "Q", "answer": "2 + 3\n#### 5"}) + "\n")
    (made,) = read(path, record="prompt").records
    assert isinstance(made, Prompt) and made.prompt == said("Q") and made.truth == {"answer": "2 + 3\n#### 5"}


def test_every_layout_has_an_example_and_a_description() -> None:
    names = {layout.name for layout in layouts() if not layout.name.startswith(("kilter-", "prompts-"))}
    assert names - ELSEWHERE <= set(EXAMPLES)
    assert all(layout.shows and len(layout.shows) < 110 for layout in layouts())


def test_the_kind_wanted_decides_between_equals_only(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(EXAMPLES["tulu-eval"][0]) + "\n")
    (graded,) = read(path, record="pair").records
    assert isinstance(graded, PreferencePair) and graded.margin == 2.0 and graded.chosen == "b"
    rows = [{"prompt": "Hi", "completion": text, "label": label} for text, label in (("good", True), ("bad", False))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (liked,) = read(path, record="demonstration", skip_bad=True).records
    assert isinstance(liked, Demonstration) and liked.messages[-1].content == "good"


OWN_PAIR = {"type": "pair", "prompt": [user("Q")], "chosen": "a", "rejected": "b"}
OWN_RATING = {"type": "rating", "prompt": [user("Q")], "responses": ["a", "b"], "values": [1, 2]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": f"{HUMAN} a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "part at turn 1 of 4 and 2"),
        ({"chosen": f"{HUMAN} a", "rejected": f"{HUMAN}"}, "'rejected' is empty"),
        ({"input": "Q", "output_1": "a", "output_2": "b", "label": 3}, "'label' is 3; it must be one of 1, 2"),
        ({"prompt": "Q", "completion": "a", "label": "maybe"}, "must be true or false"),
        ({"messages": [user("Hi")]}, "ends with a user turn; it must end with an answer"),
        ({"type": "prompt", "prompt": [user("Q")], "truth": "5"}, "'truth' is \"5\"; it must be a mapping"),
        ({"messages": [user("Hi"), {"role": "assistant", "content": None, "tool_calls": [1]}]}, "tool calls"),
        ({"prompt": "Q", "responses": ["a", "b"]}, "needs ranks"),
        ({"question": "Q", "modified_process": ["a"], "error_steps": [2]}, "number of one of 1 steps"),
        ({"instruction": "Q", "output_2": "b", "preference": 1}, "'output_1' is missing"),
        ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": None}, "must be a number"),
        ({"type": "pair", "prompt": [{"role": "user", "content": "Q"}], "chosen": "a"}, "'rejected'"),
        ({"type": "pair", "prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "'content' is missing"),
        (
            {"type": "ranking", "prompt": [user("Q")], "responses": ["a", "b"], "ranks": [0]},
            "one whole number for each",
        ),
        ({"type": "steps", "prompt": [user("Q")], "steps": ["a"], "labels": [2]}, "one number in [0, 1] for each"),
        ({"type": "feedback", "prompt": [user("Q")], "response": "a", "desirable": "yes"}, "must be true or false"),
        ({**OWN_PAIR, "weight": -1}, "'weight' is -1; it must be a number, 0 or more"),
        ({**OWN_PAIR, "weight": True}, "'weight' is true"),
        ({**OWN_PAIR, "weight": float("inf")}, "'weight' is Infinity"),
        ({**OWN_PAIR, "group": 3}, "'group' is 3; it must be a name"),
        ({**OWN_RATING, "values": [1]}, "'values' is [1]; one finite number for each response"),
        ({**OWN_RATING, "values": [1, "b"]}, "one finite number for each"),
        ({**OWN_RATING, "values": [1, float("nan")]}, "one finite number for each"),
        ({**OWN_RATING, "errors": [1, 0]}, "'errors' is [1, 0]; one above 0 for each response, or none"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    from kilter.errors import DataError

    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        read(path)
    assert reason in str(error.value)
