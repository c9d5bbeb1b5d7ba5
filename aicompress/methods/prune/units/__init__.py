"""How structural units are scored and how many stay."""
