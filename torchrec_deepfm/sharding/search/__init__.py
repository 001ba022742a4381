"""The search for a plan: candidates, assignment to ranks, lower bound."""
