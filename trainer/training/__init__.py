"""The training loop and all that it needs: loss, loader, validation, run folder, dry run."""
