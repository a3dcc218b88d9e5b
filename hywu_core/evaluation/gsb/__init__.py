"""GSB, human preference: blind pairs, votes good / same / bad, win rates with intervals."""

from __future__ import annotations
