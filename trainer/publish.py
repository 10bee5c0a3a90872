"""Upload an exported adapter or model to the Hugging Face hub: `python -m trainer.publish`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from trainer import cli
from trainer.errors import UserError, printable, require
from trainer.hub_names import is_hub_name
from trainer.training.publish import base_folder, check_login, push

USAGE = """\
usage: python -m trainer.publish runs/first/adapter --name me/support-lora [--public]

Uploads an exported folder with its README.md to the hub, into a private repository unless it is there already. Needs `hf auth login`."""


@dataclass
class Publish:
    """Upload an exported adapter or model to the hub."""

    folder: str = ""  # the adapter/ or model/ of a run
    name: str = ""  # on the hub, such as me/support-lora
    public: bool = False  # make the repository public if it is new


def main() -> int:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--folder")
    return cli.main(run, Publish, "trainer.publish", USAGE)


def run(config: Publish) -> None:
    """Upload the folder, and print its address.

    Raises UserError if there is no export, or the hub refuses it.
    """
    folder = Path(config.folder).expanduser()
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise UserError(f"folder: expected the adapter or model folder of a run, found none at {config.folder or 'no path'}")
    require(is_hub_name(config.name), "name", "a name on the hub, such as me/support-lora", config.name or "none")
    check_login("name")
    print(f"published: {push('name', folder, config.name, config.public)}")
    if base := base_folder(folder):
        print(printable(f"WARNING: adapter_config.json names {base} as the base, which others do not have"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
