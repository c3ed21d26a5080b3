"""The decoder as mathematics: layers, attention, log-probs, LoRA, sampling."""
