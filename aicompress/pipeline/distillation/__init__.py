"""The driver of distill: plan, teach, keep the best, write."""
