"""Which rules hold in which release of Megatron-Core, and what is known of a release."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rule_cases import MIXTURE
from tests.unit.layouts import cluster
from tuner.core.layout import Layout
from tuner.rules import releases
from tuner.rules.releases import TESTED_RELEASES, how_tested, rules_of_other_releases
from tuner.rules.validity import RULES, broken_rules

ROOT = Path(__file__).parents[3]


def test_a_newer_megatron_asks_less() -> None:
    layout = Layout(ep=8, overlap_moe_expert_parallel_comm=True)
    broken = {violation.rule for violation in broken_rules(layout, MIXTURE, cluster(8))}
    assert broken == {"expert-overlap-needs-two-experts"}
    assert not broken & rules_of_other_releases("0.18.2")
    newest = rules_of_other_releases("")
    assert broken < rules_of_other_releases("0.19.2+689cb04") == rules_of_other_releases("0.20") == newest
    assert not broken_rules(layout, MIXTURE, cluster(8), lifted=rules_of_other_releases("0.19"))


def test_a_rule_holds_from_its_first_release_to_the_last_before_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(releases, "RULES", (replace(RULES[0], since="0.17", gone_in="0.19"),))
    holds = {name: not rules_of_other_releases(name) for name in ("0.16.1", "0.17.0", "0.18.2", "0.19.0", "")}
    assert holds == {"0.16.1": False, "0.17.0": True, "0.18.2": True, "0.19.0": False, "": False}


def test_the_tested_releases_are_those_that_the_environments_install() -> None:
    pins = [
        re.findall(r"^megatron-core==(.+)$", (ROOT / f"constraints-{name}.txt").read_text(), re.MULTILINE)
        for name in ("oldest", "newest")
    ]
    assert [pin for [pin] in pins] == list(TESTED_RELEASES)


@pytest.mark.parametrize(
    ("release", "told"),
    [
        (TESTED_RELEASES[0], "tested"),
        (TESTED_RELEASES[-1], "tested"),
        ("0.17.1", "not tested itself, but"),
        ("0.99.0", f"newer than {TESTED_RELEASES[-1]}"),
    ],
)
def test_what_is_known_of_a_release_is_told(release: str, told: str) -> None:
    assert how_tested(release).startswith(told)
