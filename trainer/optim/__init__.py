"""AdamW on flat fp32 masters, with moments in fp32 or 8 bits, and the learning rate schedules."""
