"""``python -m bda_fx.cli`` is ``bda-fx``."""

from bda_fx.cli.app import main

main()
