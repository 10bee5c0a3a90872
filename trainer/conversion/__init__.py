"""Convert the configurations of other trainers."""
