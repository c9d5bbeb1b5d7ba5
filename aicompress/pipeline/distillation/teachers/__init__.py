"""What a student learns from: the outputs of teachers, or the average of the student itself."""
