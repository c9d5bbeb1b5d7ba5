"""The training loop: steps, what they move, what a stopped run goes on from, and what is told meanwhile."""
