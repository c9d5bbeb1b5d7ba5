"""The structural units: every file here with a UNIT is found (see `planner`)."""
