"""What bytes buy: ranks within a budget, and codes in as many bytes."""
