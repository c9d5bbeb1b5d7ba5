"""Statistics of the columns of inputs, one file each with a `STATISTIC`; `column.column_statistics` finds them."""
