"""The answer in words: is it worth moving experts, by how much, and how sure is that.

Plain text; the page escapes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from placement.comparison import FEW_WINDOWS, PolicyResult
from placement.cost import CostBreakdown
from placement.problem import Objective, Semantics
from placement.report.numbers import PER_CENT, capital, number, percent, plural
from placement.report.story import PROPOSED, Story, relative_change

__all__ = ["LEAST_GAIN", "Answer", "Verdict", "answer"]

LEAST_GAIN = 0.01
"""A smaller held-out gain over the placement in use is not worth a move."""

UNSEEN = 5e-4
"""A share that would be shown as 0.0 %."""


class Verdict(StrEnum):
    """What the report advises."""

    WORTH_IT = "worth moving"
    UNCERTAIN = "uncertain"
    NOT_WORTH_IT = "not worth it"
    UNKNOWN = "nothing to compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the report says first.

    Parameters
    ----------
    verdict
        In two words.
    headline
        One line.
    paragraph
        The numbers, in sentences.
    warnings
        What speaks against taking the numbers at their word.
    """

    verdict: Verdict
    headline: str
    paragraph: str
    warnings: tuple[str, ...]


def answer(story: Story) -> Answer:
    """Sum up a comparison for an engineer who decides whether to move experts."""
    verdict = _verdict(story)
    sentences = (
        _objective_sentence(story),
        _share_sentence(story),
        _metrics_sentence(story),
        _gap_sentence(story),
    )
    return Answer(
        verdict=verdict,
        headline=_headline(story, verdict),
        paragraph=" ".join(sentence for sentence in sentences if sentence),
        warnings=tuple(_warnings(story)),
    )


def _verdict(story: Story) -> Verdict:
    rival = _judged_against(story)
    gain = None if rival is None else story.gain_over(rival)
    if rival is None or gain is None:
        return Verdict.UNKNOWN
    if gain < LEAST_GAIN:
        return Verdict.NOT_WORTH_IT
    interval = story.interval_over(rival)
    if story.comparison.few_windows or (interval is not None and interval[0] <= 0):
        return Verdict.UNCERTAIN
    return Verdict.WORTH_IT


def _judged_against(story: Story) -> PolicyResult | None:
    """Return the reference, or a baseline that leaves too little to gain."""
    gains = [(story.gain_over(rival), rival) for rival in story.rivals]
    small = [(gain, place) for place, (gain, _) in enumerate(gains) if gain is not None and gain < LEAST_GAIN]
    return gains[min(small)[1]][1] if small else story.replaced


def _headline(story: Story, verdict: Verdict) -> str:
    rival, label = _judged_against(story), _plain_label(story)
    gain = None if rival is None else story.gain_over(rival)
    if rival is None or gain is None:
        value = _with_unit(story, story.proposed.held_out.objective)
        return f"{story.proposed.name}: {label} {value} on held-out windows, with nothing to compare it to"
    this, against = _this_placement(story), f"against {_spoken(rival)}"
    if verdict is Verdict.NOT_WORTH_IT:
        small = f"leaves {label} as it is" if abs(gain) < UNSEEN else (
            f"{'cuts' if gain > 0 else 'raises'} {label} by {'only ' if gain > 0 else ''}{percent(abs(gain))}"
        )  # fmt: skip
        return f"Not worth it: {this} {small} {against}{_gap_clause(story)}"
    interval = story.interval_over(rival)
    known = "" if interval is None else f", interval {_interval(interval)}"
    expected = "is expected to cut" if verdict is Verdict.WORTH_IT else "may cut"
    doubt = ""
    if verdict is Verdict.UNCERTAIN:
        few = story.comparison.few_windows
        doubt = ", on too few windows to be sure" if few else ", which cannot be told from noise"
    return (
        f"{capital(this)} {expected} {label} by {percent(gain)} {against}{known}{doubt}{_gap_clause(story)}"
    )


def _plain_label(story: Story) -> str:
    """Return the objective for somebody who has not seen it before."""
    label = story.objective_label
    plain = {
        "predicted step time": "MoE step time",
        "predicted step cost": "MoE step cost",
        "balance": "the fullest device's load (balance)",
        "fanout": "the devices that a token visits (fanout)",
    }
    return plain.get(label, label)


def _this_placement(story: Story) -> str:
    return "this placement" if story.proposed.name == PROPOSED else f"the placement of {story.proposed.name}"


def _spoken(rival: PolicyResult) -> str:
    return {"eplb": "EPLB", "contiguous": "experts in order (contiguous)"}.get(rival.name, rival.name)


def _gap_clause(story: Story) -> str:
    """Say how far the best may be: certified on the fitted windows, so it is claimed for these alone."""
    gap = story.gap_of(story.proposed)
    far = "no placement is better" if gap < UNSEEN else f"it is at most {percent(gap)} from the best possible"
    return f"; on the traffic that it was fitted to, {far}"


def _objective_sentence(story: Story) -> str:
    count = plural(story.comparison.num_held_out_windows, "held-out window")
    phrases = [_compared(story, rival) for rival in story.rivals]
    if not phrases:
        return f"Scored on {count}, which it was not fitted to."
    return (
        f"On {count}, which no policy was fitted to, {story.proposed.name}'s {story.objective_label} is "
        f"{_listed(phrases)}."
    )


def _compared(story: Story, rival: PolicyResult) -> str:
    gain = story.gain_over(rival)
    if gain is None:
        return f"not comparable with {rival.name}"
    if abs(gain) < UNSEEN:
        return f"the same as with {rival.name}"
    text = f"{percent(abs(gain))} {'lower' if gain > 0 else 'higher'} than with {rival.name}"
    if rival is not story.replaced:
        return text
    before, after = (story.objective_scale.text(r.held_out.objective) for r in (rival, story.proposed))
    interval = story.interval_over(rival)
    certainty = "" if interval is None else f"; 95 % interval of the gain {_interval(interval)}"
    certainty += _likeness(story, rival) if interval is not None else ""
    return f"{text} ({before} to {after} {story.objective_scale.unit}{certainty})"


def _likeness(story: Story, rival: PolicyResult) -> str:
    """Say where neighbouring windows resemble each other, which widens the interval."""
    effective, windows = story.effective_windows_over(rival), story.comparison.num_held_out_windows
    if effective > 0.9 * windows:
        return ""
    return f", for which windows that resemble their neighbours count as {effective:,.0f} independent ones"


def _interval(interval: tuple[float, float]) -> str:
    low, high = (percent(end) for end in interval)
    return f"{low.removesuffix(PER_CENT)} to {high}"


def _share_sentence(story: Story) -> str:
    rivals = story.rivals
    if not rivals:
        return ""
    shares = [story.comparison.better_share(story.proposed.name, rival.name) for rival in rivals]
    measure = story.step_label if story.measures_step else "balance"
    texts = [percent(share, digits=0) for share in shares]
    names = [rival.name for rival in rivals]
    if len(names) > 1 and len(set(texts)) == 1:
        phrases = f"{texts[0]} of windows against each of {_listed(names)}"
    else:
        pairs = [f"{text} against {name}" for text, name in zip(texts, names, strict=True)]
        phrases = _listed([f"{texts[0]} of windows against {names[0]}", *pairs[1:]])
    return f"Window by window, its {measure} is the lower one in {phrases}."


def _metrics_sentence(story: Story) -> str:
    metrics: list[tuple[str, Callable[[CostBreakdown], float | None], str]] = []
    if story.comparison.problem.objective is not Objective.BALANCE:
        metrics.append(("balance (fullest / mean device load)", lambda b: b.metrics.balance, ""))
    metrics.append(("fanout", lambda b: b.metrics.fanout, " devices per token"))
    if story.comparison.problem.semantics is Semantics.STAY_PUT:
        metrics.append(("hops", lambda b: b.metrics.hops, " per token and layer"))
    if not story.measures_step and story.step_known:
        scale = story.step_scale
        metrics.append((story.step_label, lambda b: b.step / scale.factor, f" {scale.unit}"))
    phrases = [_moved(story, label, value, unit) for label, value, unit in metrics]
    known = [phrase for phrase in phrases if phrase]
    return f"{capital(_listed(known))}." if known else ""


def _moved(story: Story, label: str, value: Callable[[CostBreakdown], float | None], unit: str) -> str:
    """Say how one figure changes from the replaced policy to the proposed one, other rivals in brackets."""
    after = value(story.proposed.held_out)
    if after is None:
        return ""
    before = None if story.replaced is None else value(story.replaced.held_out)
    if before is None:
        return f"{label} is {number(after)}{unit}"
    others = [f"{r.name} {number(value(r.held_out))}" for r in story.rivals if r is not story.replaced]
    aside = f" ({', '.join(others)})" if others else ""
    return f"{label} goes from {number(before)} to {number(after)}{unit}{aside}"


def _gap_sentence(story: Story) -> str:
    gap = story.gap_of(story.proposed)
    bound = _with_unit(story, story.comparison.lower_bound)
    if gap < UNSEEN:
        return f"On the fitted windows it is proved optimal: it meets the certified lower bound of {bound}."
    return (
        f"On the fitted windows the certified lower bound is {bound}: "
        f"no placement can be more than {percent(gap)} below {story.proposed.name} there."
    )


def _warnings(story: Story) -> list[str]:
    comparison, rival = story.comparison, story.replaced
    warnings = []
    if comparison.few_windows:
        warnings.append(
            f"Only {plural(comparison.num_held_out_windows, 'held-out window')}, fewer than {FEW_WINDOWS}: "
            "differences of a few per cent may be noise. Record a longer trace before you decide."
        )
    interval = None if rival is None else story.interval_over(rival)
    if rival is not None and interval is not None and interval[0] <= 0 <= interval[1]:
        warnings.append(
            f"The difference from {rival.name} cannot be told from noise: the 95 % interval of the gain, "
            f"{_interval(interval)}, includes zero."
        )
    warnings.extend(_step_warnings(story))
    if comparison.problem.semantics is Semantics.ALLGATHER:
        warnings.append(
            "Under all-gather every device receives every token: a placement changes the load alone."
        )
    return warnings


def _step_warnings(story: Story) -> list[str]:
    """Say what the objective does not: whether steps get faster."""
    if story.measures_step:
        return []
    if not story.step_known:
        return [f"What this does to step time is not known: {story.why_step_unknown}."]
    rival = story.replaced
    change = None if rival is None else relative_change(story.proposed.held_out.step, rival.held_out.step)
    if rival is None or change is None or change < UNSEEN:
        return []
    return [f"The {story.step_label} is {percent(change)} higher than with {rival.name}."]


def _with_unit(story: Story, value: float) -> str:
    return f"{story.objective_scale.text(value)} {story.objective_scale.unit}"


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
