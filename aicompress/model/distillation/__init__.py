"""Teacher and student models of a distillation: outputs to compare, attention in float32."""
