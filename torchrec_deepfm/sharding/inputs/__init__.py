"""What a plan is made for: hardware, tables, constraints."""
