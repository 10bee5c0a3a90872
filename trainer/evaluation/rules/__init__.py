"""Check generated answers against rules, as IFEval does. Start reading at `verdicts.py`."""
