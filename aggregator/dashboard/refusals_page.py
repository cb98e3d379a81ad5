"""Updates that were refused, by reason, with what each of them means."""

from __future__ import annotations

from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tags import attribute, box, count, text

_MEANS = {
    "malformed": "It could not be read; the broker, or a device, sends what is no update.",
    "oversized": "It was larger than an update can be.",
    "truncated": "Parts of it were missing.",
    "replayed": "It was an old one, sent again.",
    "unknown_device": "Its name is not registered, or not valid now.",
    "bad_signature": "It was not signed by the device that it names.",
    "wrong_task": "It was for a task that there is not.",
    "wrong_round": "It was for a round that there is not.",
    "wrong_model": "It was made with another model than the round's.",
    "unsealable": "It was not sealed to this round's key.",
    "wrong_length": "It had more or fewer numbers than the model.",
    "not_finite": "It had numbers that are none.",
    "too_long": "Its norm was larger than a clipped update's can be.",
    "wrong_encoding": "It was encoded in a way that the round does not take.",
    "round_closed": "It came after its round was closed: rounds may be too short.",
    "second_update": "The device had sent one for this round already.",
    "throttled": "The device sends too much; quarantine one that goes on.",
    "quarantined": "The device was put aside by an operator.",
}


def refusals_page(visit: Visit) -> None:
    """Make the page, and keep it up."""
    holder = box("section")
    shown: list[object] = [None]

    def show(state: LiveState) -> None:
        if shown[0] == state.refusals:
            return
        shown[0] = state.refusals
        holder.clear()
        with holder:
            _fill(state.refusals)

    visit.shows(show)


def _fill(refusals: dict[str, dict[str, int]]) -> None:
    """All of it."""
    reasons: dict[str, int] = {}
    for found in refusals.values():
        for reason, times in found.items():
            reasons[reason] = reasons.get(reason, 0) + times
    if not reasons:
        empty("Nothing was refused", "Every update that came so far was taken.")
        return
    most = max(reasons.values())
    text("p", f"{count(sum(reasons.values()))} since the study began, whatever became of their devices.", "cv-quiet")
    with box("ul", "cv-reasons", aria_label="Refusals by reason"):
        for reason, times in sorted(reasons.items(), key=lambda one: -one[1]):
            with box("li"):
                with box("p", "cv-line"):
                    text("strong", reason.replace("_", " "))
                    text("span", count(times), "cv-number")
                bar = box("progress", "cv-bar", max="1", aria_label=f"{reason}: share of the most frequent")
                attribute(bar, "value", f"{times / most:.4f}")
                text("p", _MEANS.get(reason, ""), "cv-quiet")
                where = [
                    f"{task or 'no task'}: {count(found[reason])}"
                    for task, found in refusals.items()
                    if reason in found
                ]
                text("p", ", ".join(where), "cv-quiet cv-small")
