"""Training sets from what the other commands made, in TRL's columns: one function a method, over rows."""
