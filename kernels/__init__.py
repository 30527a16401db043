"""Pure functions on tensors: attention, convolutions and recurrences with several backends each."""
