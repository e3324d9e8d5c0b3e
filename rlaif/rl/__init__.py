"""Reinforcement learning from AI feedback: rewards by judges and models, PPO and its kin, online preferences."""
