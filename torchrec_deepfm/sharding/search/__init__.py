"""The search for a plan: candidates, one chosen per table, placement on ranks, lower bound."""
