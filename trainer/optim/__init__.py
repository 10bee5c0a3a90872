"""AdamW over flat fp32 masters, its 8-bit form, and the learning rate schedules."""
