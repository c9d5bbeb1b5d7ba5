"""Distillation: plan it, train the student, write the best weights."""
