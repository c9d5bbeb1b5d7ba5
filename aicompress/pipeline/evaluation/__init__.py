"""The driver of eval: load, time, measure quality, judge."""
