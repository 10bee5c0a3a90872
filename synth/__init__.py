"""The synthesis half of Steadfast: a replay set written by the model itself, so that it keeps what it could already do."""
