"""What an architecture decides: which axis of which tensor holds neurons, heads, experts, the hidden width."""
