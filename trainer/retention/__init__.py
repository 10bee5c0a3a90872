"""Methods against forgetting: KL to the base, token weighting, the forgetting monitor, the replay search."""
