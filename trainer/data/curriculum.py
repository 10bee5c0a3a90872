"""Order an epoch's domain samples from easy to hard, with replay mixed in evenly: `data.curriculum`.

length  A sample is as hard as it is long, in tokens (Li et al., arXiv 2108.06084, for the stability of training).
loss    A sample is as hard as its mean loss per supervised token under the base (Xu et al., ACL 2020, for fine-tuning).

A sample's place in the epoch is the share of its role that precedes its middle, in samples or, with `replay.unit: tokens`, in tokens:

    place = (sum of a_j over the j before i in the order of the role, + a_i / 2) / sum of a_j        a_j: 1, or the tokens of sample j

The epoch takes its samples by place. So every step has the epoch's share of replay, and what the domain begins with is easy. Replay samples
stay in random order: the model knows them already.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curriculum:
    """The difficulty of each of n samples, its role, and what it counts in the share of its role."""

    difficulty: np.ndarray  # float64[n]; of replay samples it is not read
    is_replay: np.ndarray  # bool[n]
    amounts: np.ndarray  # int64[n]

    def in_order(self, epoch: np.ndarray) -> np.ndarray:
        """Return the samples of an epoch in the order of their places: int64[samples].

        Equals stay in the order they came in.
        """
        replay = self.is_replay[epoch]
        domain = epoch[~replay]
        roles = [domain[np.argsort(self.difficulty[domain], kind="stable")], epoch[replay]]
        places = [(np.cumsum(own) - own / 2) / own.sum() for own in (self.amounts[role] for role in roles)]
        return np.concatenate(roles)[np.argsort(np.concatenate(places), kind="stable")]


def steps_in_order(lengths: np.ndarray, capacity: int, max_samples_per_pack: int, packs_per_step: int) -> list[list[np.ndarray]]:
    """Divide samples of `lengths[n]` tokens into steps of packs, in their order.

    Returns the indices of each pack. A sample goes into the fullest of the step's packs that has room, and begins the next step where none
    has: every sample of a step comes before every one of the next. Only the last step may have fewer packs. Packs are less full than those
    of `packing.pack`, which chooses from the whole epoch.
    """
    steps: list[list[list[int]]] = []
    rooms: list[int] = []  # of the packs of the newest step
    for i, length in enumerate(lengths.tolist()):
        fitting = [p for p, room in enumerate(rooms) if room >= length and len(steps[-1][p]) < max_samples_per_pack]
        if fitting:
            best = min(fitting, key=rooms.__getitem__)
        else:
            if not steps or len(rooms) == packs_per_step:
                steps.append([])
                rooms = []
            steps[-1].append([])
            rooms.append(capacity)
            best = len(rooms) - 1
        steps[-1][best].append(i)
        rooms[best] -= length
    return [[np.array(pack) for pack in step] for step in steps]
