"""What a plan is to be best at."""

from __future__ import annotations

from enum import StrEnum


class Goal(StrEnum):
    TIME = "time"  # the fastest step
    COST = "cost"  # the cheapest step
    DEVICES = "devices"  # the fewest devices for a given step time
