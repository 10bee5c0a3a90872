"""Methods against forgetting: KL to the base, token weighting, forgetting monitor, replay search."""
