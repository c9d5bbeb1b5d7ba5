"""Statistics of the columns of inputs, one file each with a `STATISTIC`; `column.columns` finds them."""
