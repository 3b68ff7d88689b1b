"""Losses: reconstruction against the clean image, contrast against the network's own history."""
