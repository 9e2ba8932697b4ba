"""Answers laid out for programs and for people."""

from __future__ import annotations

from typing import Any

from millibert._many import Answer
from millibert._types import Failure

_ACCEPTED = "  ✓"  # reaches its threshold
_SHOWN_CHARACTERS = 100
_SCORE_DECIMALS = 6  # FP32 carries no more


def as_document(answer: Answer) -> dict[str, Any]:
    """Lay an answer out for `--json` and JSON Lines."""
    if isinstance(answer, Failure):
        return {
            "text": answer.text,
            "error": {"type": type(answer.error).__name__, "reason": answer.error.reason},
        }
    return {
        "text": answer.text,
        "truncated": answer.truncated,
        "known": answer.known,
        "predictions": [
            {
                "label": each.label,
                "id": each.id,
                "score": round(each.score, _SCORE_DECIMALS),
                "accepted": each.accepted,
            }
            for each in answer.predictions
        ],
    }


def as_table(answer: Answer) -> str:
    """Lay an answer out for people: the text, then a line per label with aligned scores."""
    lines = [_shown(str(answer.text))]
    if isinstance(answer, Failure):
        return "\n".join([*lines, f"  error: {answer}"])
    width = max(len(each.label) for each in answer.predictions)
    lines += [f"  {each.label:<{width}}  {each.score:.3f}{_ACCEPTED * each.accepted}" for each in answer.predictions]
    if not answer.known:
        lines.append("  note: don't know; no label reaches its threshold")
    if answer.truncated:
        lines.append("  note: longer than the model reads; the end of this text was ignored")
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Fit a text on one line, without what would steer the terminal."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
