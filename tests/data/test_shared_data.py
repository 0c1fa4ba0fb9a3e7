"""Every preference, demonstration and prompt file of the shared data: read, or its rows skipped with a reason."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from kilter.data import read
from kilter.data.lint import comparisons, label_noise
from kilter.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are not here")

# file -> (layout, rows skipped); the number of rows is counted here, without the reader.
FILES: dict[str, tuple[str, int]] = {
    "hh_rlhf/harmless-base.test.jsonl.gz": ("hh", 9),
    "hh_rlhf/helpful-base.test.jsonl.gz": ("hh", 13),
    "hh_rlhf/helpful-rejection-sampled.test.jsonl.gz": ("hh", 3),
    "llmfao/crowd-comparisons.csv": ("llmfao", 1208),
    "llmfao/gpt3-crowd-comparisons.csv": ("llmfao", 289),
    "llmfao/gpt4-crowd-comparisons.csv": ("llmfao", 289),
    "llmfao/pairs-crowd.jsonl.gz": ("llmfao-pairs", 0),
    "llmfao/prompts.jsonl": ("llmfao-prompts", 0),
    "tulu1_human_eval/eval_instances.jsonl.gz": ("completions", 0),
    "tulu1_human_eval/eval_annotations.jsonl.gz": ("tulu-eval", 0),
    "oasst_en_100/en_100_tree.jsonl.gz": ("oasst-tree", 0),
    "oasst_en_100/ranked_replies.jsonl": ("ranked-replies", 0),
    "autoj_pairwise/testdata_pairwise.jsonl.gz": ("autoj", 1),
    "llmbar/natural.jsonl": ("llmbar", 0),
    "llmbar/adversarial_gptinst.jsonl": ("llmbar", 0),
    "llmbar/adversarial_gptout.jsonl": ("llmbar", 0),
    "llmbar/adversarial_manual.jsonl": ("llmbar", 0),
    "llmbar/adversarial_neighbor.jsonl": ("llmbar", 0),
    "llmbar/processed_faireval.jsonl": ("llmbar", 0),
    "llmbar/processed_llmeval2.jsonl": ("llmbar", 1),
    "llmbar/processed_mt_bench.jsonl": ("llmbar", 0),
    "rm_bench/chat.jsonl.gz": ("rm-bench", 0),
    "rm_bench/code.jsonl.gz": ("rm-bench", 0),
    "rm_bench/safety-refuse.jsonl.gz": ("rm-bench", 0),
    "rm_bench/safety-response.jsonl.gz": ("rm-bench", 0),
    "mt_bench/question.jsonl": ("mt-bench", 0),
    "alpaca_eval/reference_text_davinci_003.jsonl": ("alpaca", 0),
    "llamafactory_demo/dpo_en_demo.jsonl": ("sharegpt-pair", 0),
    "llamafactory_demo/kto_en_demo.jsonl": ("kto-messages", 0),
    "llamafactory_demo/alpaca_en_demo.jsonl": ("alpaca", 0),
    "rasbt_instruction/instruction-data.jsonl": ("alpaca", 0),
    "rasbt_instruction/instruction-data-with-preference.jsonl": ("alpaca-pair", 0),
    "self_instruct/seed_tasks.jsonl": ("self-instruct", 0),
    "self_instruct/user_oriented_instructions.jsonl": ("self-instruct", 0),
    "self_instruct/predictions.jsonl.gz": ("dolly", 51),
    "alpaca_subset/alpaca_long.jsonl.gz": ("alpaca", 0),
    "alpaca_subset/alpaca_safety_only.jsonl.gz": ("alpaca", 0),
    "alpaca_subset/dolly_safety_only.jsonl.gz": ("dolly", 0),
    "gpteacher/roleplay.jsonl.gz": ("dolly", 0),
    "gpteacher/codegen.jsonl.gz": ("dolly", 0),
    "gsm8k/train.jsonl.gz": ("question-answer", 0),
    "gsm8k/test.jsonl.gz": ("question-answer", 0),
    "gsm8k/example_model_solutions.jsonl.gz": ("gsm8k-solutions", 0),
    "prmbench/prmbench.jsonl.gz": ("prmbench", 103),
    "prmbench/samples_prm800k.jsonl": ("prm800k", 0),
    "prmbench/samples_math-shepherd.jsonl": ("math-shepherd", 0),
    "constitutional_ai/RLMadisonFewShotPrompts.json": ("corrects", 0),
    "constitutional_ai/438HHHEvaluations.jsonl.gz": ("hhh-transcripts", 0),
    "constitutional_ai/HarmfulVsEthical.jsonl.gz": ("corrects", 0),
    "constitutional_ai/HarmfulnessClassification.jsonl.gz": ("corrects", 0),
    "constitutional_ai/samples.jsonl.gz": ("sampled-answers", 66),
    "xstest/xstest_prompts.csv": ("labelled-prompt", 0),
    "xstest/completions_annotated.jsonl.gz": ("xstest-completions", 88),
    "harmful_prompts/advbench_harmful_behaviors.csv": ("prompts-goal", 0),
    "harmful_prompts/jailbreakbench.csv": ("prompts-Goal", 0),
    "harmful_prompts/strongreject.csv": ("prompts-forbidden_prompt", 0),
    "harmful_prompts/malicious_instruct.txt": ("prompts-prompt", 0),
    "harmful_prompts/tdc2023_dev_behaviors.json": ("prompts-prompt", 0),
    "harmful_prompts/tdc2023_test_behaviors.json": ("prompts-prompt", 0),
    "harmful_prompts/harmbench_behaviors_text_all.csv": ("prompts-Behavior", 0),
    "harmless_instructions/harmless_val.jsonl.gz": ("prompts-instruction", 0),
    "harmless_instructions/harmless_test.jsonl.gz": ("prompts-instruction", 0),
    "do_not_answer/do_not_answer.jsonl": ("prompts-prompt", 0),
    "jailbreak_templates/inthewild_jailbreak.jsonl.gz": ("prompts-prompt", 0),
    "simple_safety_tests/simple_safety_tests.csv": ("prompts-prompts_final", 0),
    "red_instruct/harmfulqa.json": ("topics", 0),
    "red_instruct/catqa_english.json": ("topics", 0),
    "red_instruct/dangerousqa.json": ("prompts-prompt", 0),
    "beavertails_evaluation/beavertails_evaluation.jsonl": ("prompts-prompt", 0),
    "openai_moderation/samples-1680.jsonl.gz": ("prompts-prompt", 0),
    "safety_tuned_llamas/safety_only_data_Instructions.jsonl.gz": ("alpaca", 0),
    "safety_tuned_llamas/evaluation.jsonl": ("prompts-instruction", 0),
    "truthfulqa/TruthfulQA.csv": ("truthfulqa", 0),
    "truthfulqa/finetune_truth.jsonl.gz": ("trl-completion", 0),
    "truthfulqa/finetune_info.jsonl.gz": ("trl-completion", 0),
    "halueval/general_data.jsonl.gz": ("halueval-general", 0),
    "halueval/qa_one-turn.jsonl.gz": ("halueval-qa", 0),
    "halueval/qa_multi-turn.jsonl.gz": ("halueval-qa", 0),
    "sycophancy_ood/nlp_survey.jsonl.gz": ("sycophancy", 0),
    "sycophancy_ood/freeform.jsonl": ("prompts-initial_user_message", 0),
    "elephant_sample/OEQ_sample.csv": ("prompts-prompt", 0),
    "anthropic_evals/advanced_ai_risk.jsonl.gz": ("behaviour-test", 0),
    "anthropic_evals/personas.jsonl.gz": ("behaviour-test", 0),
}
# Verdicts whose answers stand in another file: no row can be read, and the error says how many and why.
VERDICTS_ONLY = {
    "alpaca_eval/annotations_gpt4_vs_davinci003.jsonl.gz": 11264,
    "alpaca_eval/judge_agreement.jsonl.gz": 6439,
}


def rows_in(path: Path) -> int:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    if path.name.endswith(".csv"):
        return len(list(csv.reader(text.splitlines(keepends=True)))) - 1
    if path.name.endswith(".json"):
        value = json.loads(text)
        return len(value) if isinstance(value, list) else 1
    return sum(bool(line.strip()) for line in text.split("\n"))


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read_or_skipped_with_a_reason(name: str) -> None:
    layout, skipped = FILES[name]
    result = read(SHARED / name, skip_bad=True)
    assert result.format == layout
    assert result.rows == rows_in(SHARED / name)
    assert len(result.skipped) == skipped
    assert all(skip.reason and skip.line for skip in result.skipped)
    assert len(result.records) >= result.rows - skipped


@pytest.mark.parametrize("name", VERDICTS_ONLY)
def test_verdicts_without_answers_are_counted(name: str) -> None:
    count = VERDICTS_ONLY[name]
    assert rows_in(SHARED / name) == count
    with pytest.raises(DataError, match=rf"none of its {count} rows could be read \({count} rows: .*join them"):
        read(SHARED / name, skip_bad=True)


def test_known_counts() -> None:
    trees = read(SHARED / "oasst_en_100/en_100_tree.jsonl.gz").records
    flat = read(SHARED / "oasst_en_100/ranked_replies.jsonl").records
    assert {(r.prompt, r.responses) for r in trees} == {(r.prompt, r.responses) for r in flat}  # type: ignore[attr-defined]
    autoj = read(SHARED / "autoj_pairwise/testdata_pairwise.jsonl.gz", skip_bad=True).records
    assert sum(pair.tie for pair in autoj) == 373  # type: ignore[attr-defined]
    crowd = read(SHARED / "llmfao/crowd-comparisons.csv", skip_bad=True).records
    assert len({verdict.annotator for verdict in crowd}) == 124  # type: ignore[attr-defined]
    assert sum(verdict.ranks == (0, 0) for verdict in crowd) == 2794  # type: ignore[attr-defined]
    noise = label_noise(comparisons(crowd))
    assert noise is not None and 0.2 < noise.rate.mean < 0.25
    pairs = read(SHARED / "rm_bench/chat.jsonl.gz", record="pair").records
    assert len(pairs) == 129 * 9
