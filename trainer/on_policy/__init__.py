"""Train on answers that the model itself gives as it trains."""
