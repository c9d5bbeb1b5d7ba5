"""What bytes buy: sizes of factors, ranks within a budget, and codes in as many bytes."""
