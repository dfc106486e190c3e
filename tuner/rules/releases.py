"""The releases of Megatron-Core: which is installed, which are tested, and which rules do not hold in a release."""

from importlib.metadata import PackageNotFoundError, version

from tuner.rules.rule import Rule
from tuner.rules.validity import RULES

TESTED_RELEASES = ("0.16.1", "0.19.2")
"""The releases with which the tests run: the oldest supported one, and the newest."""


def installed_release() -> str:
    """Return the version of the Megatron-Core that is installed here; empty if no package of this name is."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return ""


def rules_of_other_releases(megatron_core: str) -> frozenset[str]:
    """Return the ids of the rules that do not hold in this release of Megatron-Core.

    `megatron_core` is a version such as `0.19.2`; an empty text, for an unknown version, counts as the newest.
    """
    release = _numbers(megatron_core) or _numbers(TESTED_RELEASES[-1])
    return frozenset(rule.id for rule in RULES if not _holds_in(rule, release))


def how_tested(megatron_core: str) -> str:
    """Return what is known of this release of Megatron-Core from tests, as the end of a sentence about it."""
    oldest, newest = TESTED_RELEASES[0], TESTED_RELEASES[-1]
    if megatron_core in TESTED_RELEASES:
        return "tested"
    if _numbers(megatron_core) > _numbers(newest):
        return f"newer than {newest}, the newest that is tested: what it refuses beyond that is not known"
    return f"not tested itself, but {oldest} and {newest} are"


def _holds_in(rule: Rule, release: tuple[int, ...]) -> bool:
    """Return whether a rule holds in a release, of which the major and the minor number are given."""
    return _numbers(rule.since) <= release and (not rule.gone_in or release < _numbers(rule.gone_in))


def _numbers(release: str) -> tuple[int, ...]:
    """Return the major and the minor number of a version such as `0.19.2`; empty for an empty text."""
    return tuple(int(part) for part in release.split(".")[:2] if part.isdigit())
