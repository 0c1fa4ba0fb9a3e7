"""The brakes: what a run shows when it goes wrong, which symptoms name which causes, and why a run failed.

Nothing here loads torch: symptoms are functions of figures, so `kilter report why` finds in the files of a run what the
watch found while it went on.
"""

from __future__ import annotations

from kilter.guard.causes import CAUSES, Cause, Course, Named, causes
from kilter.guard.rows import Steps, rows_of
from kilter.guard.symptoms import CANARY, SYMPTOMS, Symptom
from kilter.guard.texts import correlation, risen, text_figures, usual
from kilter.guard.watch import ALARMS, Alarm, Watch, looked_back
from kilter.guard.why import StageFound, in_words, why

__all__ = [
    "ALARMS",
    "CANARY",
    "CAUSES",
    "SYMPTOMS",
    "Alarm",
    "Cause",
    "Course",
    "Named",
    "StageFound",
    "Steps",
    "Symptom",
    "Watch",
    "causes",
    "correlation",
    "in_words",
    "looked_back",
    "risen",
    "rows_of",
    "text_figures",
    "usual",
    "why",
]
