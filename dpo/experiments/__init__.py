"""What is run once to learn something: the reward-KL frontier, and Diffusion-DPO with a known optimum."""
