"""What a model can do: metrics, evaluation, out-of-distribution detection."""
