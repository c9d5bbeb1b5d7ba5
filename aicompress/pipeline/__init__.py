"""Drivers: plan a step from headers, then run it. One driver per kind of step; one output and one report for all."""
