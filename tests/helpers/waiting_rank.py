"""Be one of some ranks that meet; rank 1 dies, if it is told to, and the others wait for it by a sleep or a collective.

`python -m tests.helpers.waiting_rank how`, with `how` one of sleep, collective, error, none.
"""

import os
import sys
import time

import torch
import torch.distributed

from trainer.errors import UserError
from trainer.runtime import lost_ranks
from trainer.runtime.distributed import process_group

lost_ranks.GRACE = 0.5 if sys.argv[1] == "sleep" else 60.0
try:
    with process_group(torch.device("cpu")) as dist:
        if dist.rank == 1 and sys.argv[1] in ("sleep", "collective"):
            os._exit(9)
        if sys.argv[1] == "error":
            raise UserError("a mistake that all ranks find")
        if sys.argv[1] == "sleep":
            time.sleep(60)
        dist.gather(dist.rank)
except UserError as error:
    sys.exit(str(error))
