"""What a distillation needs of its models: outputs to compare, attention in float32."""
