"""Does the monitor name the right cause? Runs the cases of tests/causes.

python tests/benchmarks/causes.py [--part tuned|held-back|all] [--no-probe]
                                  [--only NAME] [--truth] [--verbose]
                                  [--markdown docs/benchmarks.md]
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "causes"))

from cluster import add_devices

# Before anything uses TensorFlow: for the cases with several replicas.
add_devices()

import kit  # noqa: E402
import truth  # noqa: E402
from cases import CASES  # noqa: E402
from kit import Case, Outcome  # noqa: E402
from page import Section, new_parser, table  # noqa: E402

Results = Sequence[tuple[Case, Outcome | None]]
QUIET = "(silent)"
BROKEN = "(error)"


def guarded(case: Case, modes: list[bool]) -> Sequence[Outcome | None]:
    """The outcomes, or None where it ended in an error, which is printed."""
    try:
        return kit.watched(case, modes)
    except Exception as error:
        print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        return [None] * len(modes)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def said(outcome: Outcome | None) -> str:
    if outcome is None:
        return BROKEN
    return ", ".join(outcome.causes) or QUIET


def wanted(case: Case) -> str:
    return (case.expected or QUIET) if case.scored else "(anything)"


def full_name(case: Case) -> str:
    return f"{case.build.__module__}.{case.name}"


def print_rows(case: Case, outcomes: Sequence[Outcome | None]) -> None:
    part = "held back" if case.held_back else "tuned"
    cells = f"{case.name:46} {part:9} {wanted(case):18}"
    for outcome in outcomes:
        right = outcome is not None and outcome.is_right(case)
        figures = ""
        if outcome is not None:
            gap, lag = number(outcome.gap), number(outcome.lag)
            figures = f"gap {gap:>8} lag {lag:>8} {outcome.seconds:4.1f}s"
        cells += f" | {' ' if right else '✗'} {said(outcome):28} {figures}"
    print(cells, flush=True)


def print_summary(title: str, results: Results) -> None:
    """The confusion table, the share of right answers and the false alarms."""
    scored = [(case, outcome) for case, outcome in results if case.scored]
    if not scored:
        return
    print(f"\n{title}")
    counts = Counter((wanted(case), said(outcome)) for case, outcome in scored)
    for (expected, answer), count in sorted(counts.items()):
        print(f"  {expected:18} -> {answer:40} {count}")
    problems = [pair for pair in scored if pair[0].expected]
    quiet = [pair for pair in scored if not pair[0].expected]
    right = sum(bool(one and one.is_right(case)) for case, one in problems)
    alarms = sum(bool(one and one.causes) for _, one in quiet)
    share = f" ({right / len(problems):.0%})" if problems else ""
    print(f"  right: {right} of {len(problems)} problems{share}")
    print(f"  false alarms: {alarms} of {len(quiet)} silent cases")


PAGE = """\
The monitor watches the cases of `tests/causes`: small models on real or made data, each
with one known problem or with none. The rules were tuned on a part of them; the others
were held back. It is *right* if it names the cause; a *false alarm* is any cause that
it names in a case without a problem.

{summary}

By cause, of all cases{probe}:

{causes}
"""
SUMMARY_HEAD = ("probe", "part", "problems", "right", "silent cases", "false alarms")
CAUSES_HEAD = ("cause", "cases", "right", "otherwise named")


def summary_row(has_probe: bool, held_back: bool, results: Results) -> tuple[str, ...]:
    """How often the monitor was right in one part of the cases."""
    scored = [
        (case, outcome)
        for case, outcome in results
        if case.scored and case.held_back == held_back
    ]
    problems = [pair for pair in scored if pair[0].expected]
    quiet = [pair for pair in scored if not pair[0].expected]
    right = sum(bool(one and one.is_right(case)) for case, one in problems)
    alarms = sum(bool(one and one.causes) for _, one in quiet)
    share = f"{right} ({right / len(problems):.0%})" if problems else "-"
    part = "held back" if held_back else "tuned"
    probe = "with" if has_probe else "without"
    return probe, part, str(len(problems)), share, str(len(quiet)), str(alarms)


def cause_rows(results: Results) -> list[tuple[str, ...]]:
    """For each cause, how often it was named and what was named instead."""
    rows = []
    scored = [(case, outcome) for case, outcome in results if case.scored]
    for cause in sorted({wanted(case) for case, _ in scored}):
        pairs = [pair for pair in scored if wanted(pair[0]) == cause]
        wrong = [said(one) for case, one in pairs if not (one and one.is_right(case))]
        counts = Counter(wrong).most_common()
        named = "; ".join(f"{answer}: {count}" for answer, count in counts)
        right = str(len(pairs) - len(wrong))
        rows.append((cause, str(len(pairs)), right, named or "-"))
    return rows


def page_of(results: dict[bool, list[tuple[Case, Outcome | None]]]) -> str:
    """All of it as text of the page."""
    rows = [
        summary_row(has_probe, held_back, found)
        for has_probe, found in results.items()
        for held_back in (False, True)
        if any(case.held_back == held_back for case, _ in found)
    ]
    has_probe = next(iter(results))
    return PAGE.format(
        summary=table(SUMMARY_HEAD, rows),
        probe=" with a probe" if has_probe else " without a probe",
        causes=table(CAUSES_HEAD, cause_rows(results[has_probe])),
    )


def print_truth(case: Case) -> None:
    """What a case really has, apart from any diagnosis."""
    try:
        found = truth.examine(case)
    except Exception as error:
        print(f"✗ {case.name}: {type(error).__name__}: {error}")
        return
    losses = found.losses
    print(
        f"{' ' if found.is_as(case) else '✗'} {case.name:40} {wanted(case):18} "
        f"G {number(losses.gap):>8} in batches of 32 {number(found.in_32.gap):>8} "
        f"debiased {number(found.debiased):>8} settled {number(found.settled):>8} | "
        f"inference {number(losses.inference):>8} batch {number(losses.batch):>8} "
        f"recalibrated {number(losses.recalibrated):>8} "
        f"trivial {number(losses.trivial):>5} "
        f"{'moved' if found.has_moved else 'unmoved'}",
        flush=True,
    )


def main() -> None:
    parser = new_parser(__doc__.split("\n")[0])
    parser.add_argument("--part", choices=["tuned", "held-back", "all"], default="all")
    parser.add_argument("--no-probe", action="store_true", help="only without a probe")
    parser.add_argument("--with-probe", action="store_true", help="only with a probe")
    parser.add_argument(
        "--only", help="a part of the name of a case or its file, or a cause"
    )
    parser.add_argument("--truth", action="store_true", help="no monitor: is it so?")
    parser.add_argument("--verbose", action="store_true", help="print the warnings")
    args = parser.parse_args()
    chosen = [
        case
        for case in CASES
        if args.part in ("all", "held-back" if case.held_back else "tuned")
        and (
            args.only is None
            or args.only in full_name(case)
            or args.only == case.expected
        )
    ]
    if args.truth:
        for case in chosen:
            print_truth(case)
        return
    section = Section("causes")
    modes = [True] * (not args.no_probe) + [False] * (not args.with_probe)
    results: dict[bool, list[tuple[Case, Outcome | None]]] = {m: [] for m in modes}
    for case in chosen:
        outcomes = guarded(case, modes)
        for mode, outcome in zip(modes, outcomes, strict=True):
            results[mode].append((case, outcome))
        print_rows(case, outcomes)
        if args.verbose:
            for outcome in outcomes:
                for message in outcome.messages if outcome else ():
                    print(f"    {message}")
    for mode in modes:
        probe = "with a probe" if mode else "without a probe"
        for part, held_back in (("tuned", False), ("held back", True)):
            pairs = [pair for pair in results[mode] if pair[0].held_back == held_back]
            print_summary(f"{part}, {probe}", pairs)
    if args.markdown is not None:
        section.write(page_of(results), args.markdown)


if __name__ == "__main__":
    main()
