"""Training on the labels: supervised fine-tuning, reward models, the DPO family, KTO. TRL carries it."""
