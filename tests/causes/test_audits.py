"""Does `audit` name what is wrong, and does following its advice help?"""

import fresh_audits  # noqa: F401
import pytest
import second_audits  # noqa: F401
from audits import Audit, audits, is_better

from bn_callbacks import audit
from bn_callbacks.report import BatchNormReport

QUICK = (
    "learning_rate_finder",
    "table_in_other_units",
    "recalibrated_after_a_short_run",
)


def name(case: Audit) -> str:
    return case.name


def check(case: Audit) -> BatchNormReport:
    """Audits a case, and follows the advice where there is one."""
    given = case.made()
    report = audit(given.model, given.data, batch_size=given.batch_size)
    causes = {layer.cause for layer in report.lagging}
    if not case.expected:
        assert not causes, report
        return report
    assert causes, report
    assert causes <= set(case.expected), report
    before = given.loss()
    advice = " ".join(layer.advice for layer in report.lagging)
    if "Do not recalibrate" in advice:
        # Whatever is done, the model is right for its own data already.
        given.follow()
        assert given.loss() <= before
        given.model.evaluate(*given.held_out, verbose=0)
    else:
        assert is_better(given.follow(), before), report
    return report


@pytest.mark.parametrize("case", [c for c in audits if c.name in QUICK], ids=name)
def test_the_verdict_is_right_and_its_advice_helps(case: Audit) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The data given differ")
@pytest.mark.parametrize("case", [c for c in audits if c.name not in QUICK], ids=name)
def test_all_other_verdicts_are_right_too(case: Audit) -> None:
    check(case)


def test_each_kind_has_cases_in_both_parts() -> None:
    kinds = {frozenset(case.expected) for case in audits}
    for kind in kinds - {frozenset({"outliers"})}:
        parts = {case.held_back for case in audits if set(case.expected) == kind}
        assert parts == {False, True}, kind
