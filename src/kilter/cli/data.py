"""`kilter data check | agreement | annotators | rate | scale | filter | convert | show | formats`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kilter.cli.options import new_jsonl, parse
from kilter.config import Model
from kilter.errors import ConfigError, one_line

if TYPE_CHECKING:
    from kilter.data import ReadResult
    from kilter.records import Record
    from kilter.stats import Interval
    from kilter.stats.misfit import Misfit

WORST = 5
"""Annotators and items shown."""

HELP = """usage: kilter data ACTION FILE [options]

  check FILE           duplicates, contradictions, cycles, leakage, length, label noise; exit code 1 on errors
  agreement FILE       how far annotators agree beyond chance, with intervals; who and what pulls it down
  annotators FILE      how well each annotator judges, and whether he likes length or a side; --out F: with weights
  rate FILE            how strong the compared models are, with intervals; Elo beside; control of style
  scale FILE --out F   a number with its error for every compared response, for a reward model to learn
  filter FILE --out F  leave records out by rules, each counted
  convert FILE --out F rewrite any known layout as Kilter's own JSONL
  show FILE --model M  records as the model will see them, token by token, with what is scored
  formats              the layouts that are recognised

example:
  kilter data check pairs.jsonl --held-out test.jsonl"""


class ReadOptions(Model):
    """How a file is read."""

    record: str | None = None
    """Kind of record: demonstration, pair, ranking, feedback, prompt, steps, judgement. Default: what it holds."""
    format: str = "auto"
    """Layout of the rows; `auto` recognises it by content."""
    skip_bad: bool = False
    """Set bad rows aside in a file in --aside and count them, instead of stopping at the first."""
    aside: Path = Path()
    """Folder for the rows set aside."""


class CheckOptions(ReadOptions):
    """Say what is wrong with a data file before anybody trains on it."""

    held_out: Path | None = None
    """A test file: prompts that stand in both are an error."""
    as_json: bool = False
    """Print the findings as JSON."""


class AgreementOptions(ReadOptions):
    """Say how far annotators agree, beside what is published of others. Low agreement is told, never an error."""

    as_json: bool = False
    """Print everything as JSON."""
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 1000
    """Draws of items for the intervals."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws."""


class AnnotatorsOptions(ReadOptions):
    """Say how well each annotator judges and what he likes beside quality; weigh judgements by it."""

    as_json: bool = False
    """Print everything as JSON."""
    show: Annotated[int, Field(ge=1)] = 20
    """Annotators shown, the least skilled first; JSON has all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draws from the posterior."""
    shared_length: Literal["quality", "liking"] = "quality"
    """What the crowd's liking for length is taken for in the weights: verdicts cannot tell."""
    out: Path | None = None
    """File to write the judgements to with weights by skill, of mean 1, in place of theirs; it must not exist yet."""


class RateOptions(ReadOptions):
    """Rate the models whose responses were compared; intervals hold annotators and prompts together."""

    ties: Literal["half", "davidson"] = "half"
    """A tie is half a win of both (Bradley-Terry), or an outcome of its own (Davidson)."""
    model: Literal["bradley-terry", "plackett-luce"] = "bradley-terry"
    """Every two responses of a ranking for themselves, or (plackett-luce) rankings taken whole: a ranking of k says
    k - 1 times who is best of those that are left; its k (k - 1) / 2 comparisons say some of that more than once. A tie
    is then a win of each over those tied with it."""
    bootstrap: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Draws of whole clusters (annotators times prompts) for a second interval of each strength; 0: none."""
    style: bool = False
    """Strength beside the length, lists and headers of the responses."""
    as_json: bool = False
    """Print everything as JSON."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the shuffles that show how Elo's ratings depend on the order, and of the draws."""


class ScaleOptions(ReadOptions):
    """Write a number with its standard error for every response that was compared (records of kind `rating`)."""

    out: Path | None = None
    """File to write; it must not exist yet."""
    sigma: Annotated[float, Field(gt=0)] | None = None
    """How much responses to one prompt differ, in nats of odds. Default: fitted, where several verdicts on the same
    responses say it."""


class FilterOptions(ReadOptions):
    """Write the records that every rule keeps; `kilter data formats` and the docs list the rules."""

    out: Path | None = None
    """File to write; it must not exist yet."""
    rules: tuple[str, ...] = ("duplicates", "identical")
    """Rules by name, `name` or `name=value`, for example max-chars=2000."""
    held_out: Path | None = None
    """A test file, for the rule `leaked`."""


class ConvertOptions(ReadOptions):
    """Rewrite a file of any known layout as Kilter's own JSONL."""

    out: Path | None = None
    """File to write; it must not exist yet."""


class ShowOptions(ReadOptions):
    """Print records token by token; scored tokens stand in [brackets]."""

    model: str = ""
    """Folder or hub name whose tokenizer and chat template are used."""
    count: Annotated[int, Field(gt=0)] = 3
    """How many records."""


def run(command: str, argv: list[str]) -> int:
    """Dispatch to an action."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if argv[0] == "formats":
        return _formats()
    actions: dict[str, tuple[type[ReadOptions], Callable[..., int]]] = {
        "check": (CheckOptions, _check),
        "agreement": (AgreementOptions, _agreement),
        "annotators": (AnnotatorsOptions, _annotators),
        "rate": (RateOptions, _rate),
        "scale": (ScaleOptions, _scale),
        "filter": (FilterOptions, _filter),
        "convert": (ConvertOptions, _convert),
        "show": (ShowOptions, _show),
    }
    if argv[0] not in actions:
        raise ConfigError(f"kilter {command}: no action {argv[0]!r}; choose one of {', '.join(actions)}, formats")
    options_type, action = actions[argv[0]]
    prog = f"kilter {command} {argv[0]} FILE"
    words = argv[1:]
    if words and words[0] in ("-h", "--help"):
        parse(options_type, ["--help"], prog=prog, default=options_type())
    if not words or words[0].startswith("-"):
        raise ConfigError(f"{prog}: the file comes first; {prog} --help lists every option")
    return action(words[0], parse(options_type, words[1:], prog=prog, default=options_type()))


def _read(path: str, options: ReadOptions) -> ReadResult:
    from kilter.data import read

    to = options.aside if options.skip_bad else None
    found = read(path, record=options.record, format=options.format, skip_bad=options.skip_bad, skipped_to=to)
    if found.skipped:
        print(f"{path}: {len(found.skipped)} of {found.rows} rows set aside in {found.skipped_path}", file=sys.stderr)
    return found


def _judgements(path: str, options: ReadOptions) -> list[Record]:
    """Whatever the file holds otherwise."""
    return _read(path, options.model_copy(update={"record": "judgement"})).records


def _check(path: str, options: CheckOptions) -> int:
    from kilter.data import read
    from kilter.data.lint import check

    result = _read(path, options)
    held_out = read(options.held_out).records if options.held_out else []
    findings = check(result.records, held_out=held_out)
    if options.as_json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=1))
    else:
        print(f"{path}: {len(result.records)} records, layout {result.format}")
        for finding in findings:
            rows = f" (records {', '.join(str(row + 1) for row in finding.examples)})" if finding.examples else ""
            print(f"  {finding.severity:<8}{finding.name}: {finding.message}{rows}")
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _agreement(path: str, options: AgreementOptions) -> int:
    from kilter.data.agree import BESIDE, TEXTBOOK, agreement_of
    from kilter.data.judgements import verdicts

    found = verdicts(_judgements(path, options))
    told = agreement_of(found, seed=options.seed, resamples=options.resamples)
    if options.as_json:
        print(json.dumps(told.to_dict(), indent=1))
        return 0
    print(
        f"{path}: {told.judgements} judgements by {told.annotators} annotators; {told.items} items (two responses each)"
    )
    if told.repeated:
        print(f"  {told.repeated} further verdicts of an annotator on an item he had judged are left out")
    if told.identical:
        print(f"  {told.identical} verdicts on two responses of one text are left out")
    for name, interval in told.measures.items():
        print(f"  {name:<16}{_figure(interval)}  {BESIDE[name].text if name in BESIDE else ''}".rstrip())
    for title, groups in (("alpha by kind", told.by_kind), ("alpha by time", told.by_time)):
        if groups:
            print(f"  {title}:")
        for name, interval in groups.items():
            print(f"    {_figure(interval)}  {one_line(name) or 'no kind'}")
    if told.pairs:
        print("  kappa of the annotators with the most items in common:")
        for names, (kappa, common) in told.pairs.items():
            print(f"    {_figure(kappa)}  {one_line(' and '.join(names))}, {common} items")
    worst = [(name, pull) for name, pull in told.pull.items() if pull < 0][:WORST]
    if worst:
        print("  annotators who pull alpha down, and by how much:")
        for name, pull in worst:
            print(f"    {pull:+.3f}  {one_line(name)}")
    odd = [(item, pull) for item, pull in told.items_pull.items() if pull < 0][:WORST]
    if odd:
        print("  items that pull alpha down most:")
    for item, pull in odd:
        texts = [one_line(text) for text in found.texts[item]]
        shown = [text if len(text) <= 40 else text[:39] + "…" for text in texts]
        print(f"    {pull:+.4f}  {shown[0]!r} or {shown[1]!r}")
    alpha = told.measures.get("alpha, nominal")
    if alpha is not None and alpha.high < TEXTBOOK:
        print(
            f"  alpha lies below the textbooks' {TEXTBOOK:g}, as those of published preferences do: the verdicts are "
            "noisy, a reward model needs more of them, and what annotators agree on is what it can learn"
        )
    return 0


def _annotators(path: str, options: AnnotatorsOptions) -> int:
    from kilter.data import write
    from kilter.data.crowd import annotators_of, weighted

    out = new_jsonl(options.out) if options.out else None
    records = _judgements(path, options)
    told = annotators_of(records, shared=options.shared_length, seed=options.seed)
    if out:
        write(out, weighted(records, told))
    if options.as_json:
        print(json.dumps(told.to_dict(), indent=1))
        return 0
    print(
        f"{path}: {told.judgements} judgements by {len(told.annotators)} annotators; {told.items} items (two responses "
        f"each), {told.items_of_several} of them judged by several"
    )
    print(f"  {'skill':<23}{'length':<23}{'side':<23}annotator (judgements)")
    print("  nats of odds: skill for a standard deviation of quality (0: a coin; below: an adversary),")
    print("  length for twice the words, side for being shown first; in each column shrunk to the crowd's mean")
    for name, skill, length, side in [
        *(
            (f"{one_line(a.name)} ({a.judgements}{'' if a.with_others else ', alone'})", a.skill, a.length, a.side)
            for a in told.annotators[: options.show]
        ),
        ("the crowd's mean", told.skill, told.length, told.side),
    ]:
        print(f"  {_signed(skill):<23}{_signed(length):<23}{_signed(side):<23}{name}")
    if len(told.annotators) > options.show:
        print(f"  {len(told.annotators) - options.show} more annotators; --show N, or --as-json for all")
    alone = sum(not annotator.with_others for annotator in told.annotators)
    if alone:
        print(
            f"  {alone} annotators judged nothing that anybody else judged (alone): their skill is the crowd's, "
            "whatever they did"
        )
    if told.side:
        liked = "liked" if told.side.low > 0 else "disliked" if told.side.high < 0 else "neither liked nor disliked"
        print(f"  the side shown first is {liked}")
    else:
        print("  nothing says which response was shown first ('shown'): no liking for a side can be told")
    if told.length and told.length.excludes(0.0):
        more = "longer" if told.length.mean > 0 else "shorter"
        print(f"  {more} responses win: whether they are better or only liked is not in verdicts")
    if out:
        print(f"{out}: {told.judgements} judgements with weights by skill")
    return 0


def _signed(interval: Interval | None) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]" if interval else "-"


def _rate(path: str, options: RateOptions) -> int:
    from kilter.data.rate import comparisons_of, contexts_of, rankings_of, rating_of

    whole = options.model == "plackett-luce"
    if whole and (options.style or options.ties != "half"):
        raise ConfigError(
            "kilter data rate: --model plackett-luce has no --style and no --ties davidson; leave them out, or rate by "
            "--model bradley-terry"
        )
    records = _judgements(path, options)
    told = rating_of(
        comparisons_of(records, style=options.style),
        ties=options.ties,
        seed=options.seed,
        rankings=rankings_of(records) if whole else None,
        contexts=contexts_of(records),
        bootstrap=options.bootstrap,
    )
    if options.as_json:
        print(json.dumps(told.to_dict(), indent=1))
        return 0
    print(f"{path}: {told.comparisons} comparisons, {told.ties} of them ties, of {len(told.models)} models")
    print("  points (400: odds of ten); = cannot be told from the next; Elo's rating in the file's order and in others")
    alone = "comparison" if told.rankings is None else "ranking"
    print(f"  intervals hold together what is of one {' or '.join(told.clusters) or alone}")
    if told.rankings is not None:
        print(f"  strengths are those of {told.rankings} rankings taken whole (Plackett and Luce)")
    if options.bootstrap:
        print(f"  drawn: of {options.bootstrap} draws of whole clusters, {told.unrated} of which had no rating")
    for place, model in enumerate(told.models, start=1):
        low, mean, high = model.strength.low, model.strength.mean, model.strength.high
        print(
            f"  {place:>3} {mean:+6.0f} [{low:+.0f}, {high:+.0f}] {' ' if model.apart else '='} {one_line(model.name)}"
            f"  ({model.comparisons} comparisons; Elo {model.elo:+.0f}, {model.elo_low:+.0f} to {model.elo_high:+.0f})"
            + (f", drawn [{model.redrawn.low:+.0f}, {model.redrawn.high:+.0f}]" if model.redrawn else "")
        )
    for name, worth in told.style.items():
        print(f"  style: one standard deviation more {name} is worth {worth:+.0f} points")
    if told.misfit is not None:
        _print_misfit(told.misfit)
    return 0


def _print_misfit(found: Misfit) -> None:
    from kilter.stats.ratings import ELO_PER_NAT

    some = False
    for family in found.departures:
        departures = found.found(family)
        for one in departures[: 2 * WORST]:
            where = f"against {one.against}" if one.against is not None else f"where {family} is {one.context!r}"
            points, tests = ELO_PER_NAT * one.effect, len(found.departures[family])
            print(
                f"  strengths do not say: {one_line(str(one.name))} is {abs(points):.0f} points "
                f"{'better' if points > 0 else 'worse'} {one_line(where)} than elsewhere "
                f"({one.comparisons} comparisons; p {one.adjusted:.2g}, corrected for {tests} tests)"
            )
        if len(departures) > 2 * WORST:
            print(f"  and {len(departures) - 2 * WORST} more by {family}; --as-json lists them")
        some = some or bool(departures)
    if found.p < 0.05 and not some:
        print(f"  strengths do not say all about pairs (p {found.p:.2g}), but of no single one that is sure")


def _scale(path: str, options: ScaleOptions) -> int:
    from kilter.data import write
    from kilter.data.scale import ratings_of

    out = new_jsonl(options.out)
    found = ratings_of(_judgements(path, options), sigma=options.sigma)
    write(out, found.records)
    how = "given" if options.sigma else "fitted"
    print(f"{out}: {len(found.records)} prompts, {found.responses} responses; sigma {found.sigma:.3f} nats ({how})")
    if found.identical:
        print(f"  {found.identical} comparisons of two responses of one text are left out")
    return 0


def _figure(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _filter(path: str, options: FilterOptions) -> int:
    from kilter.data import read, write
    from kilter.data.filter import filter_records

    out = new_jsonl(options.out)
    records = _read(path, options).records
    held_out = read(options.held_out).records if options.held_out else []
    kept, dropped = filter_records(records, options.rules, held_out=held_out)
    write(out, kept)
    print(f"{out}: {len(kept)} of {len(records)} records kept")
    for name, count in dropped.most_common():
        print(f"  {count} left out by {name}")
    return 0


def _convert(path: str, options: ConvertOptions) -> int:
    from kilter.data import write

    out = new_jsonl(options.out)
    found = _read(path, options)
    write(out, found.records)
    print(f"{out}: {len(found.records)} records from {found.rows} rows of layout {found.format}")
    return 0


def _show(path: str, options: ShowOptions) -> int:
    if not options.model:
        raise ConfigError("kilter data show: --model must be given: its tokenizer and chat template are shown at work")
    from kilter.data.chat import ChatEncoder
    from kilter.data.show import show
    from kilter.models.load import load_tokenizer

    records = _read(path, options).records[: options.count]
    for row in show(records, ChatEncoder(load_tokenizer(options.model))):
        print(f"record {row.record + 1}, {row.label}: {len(row.tokens)} tokens, {row.scored} scored {row.problem}")
        texts = [repr(token.text)[1:-1] for token in row.tokens]
        print(
            "  " + "".join(f"[{text}]" if token.scored else text for text, token in zip(texts, row.tokens, strict=True))
        )
    return 0


def _formats() -> int:
    from kilter.data import layouts

    for layout in layouts():
        print(f"{layout.name:<24}{layout.record:<16}{', '.join(sorted(layout.has))}")
    return 0
