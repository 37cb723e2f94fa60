"""`python -m offline_kd`, and under `torchrun -m offline_kd`: the command line."""

from offline_kd.cli.main import main

main()
