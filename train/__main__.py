"""``python -m train``, for launchers that start modules: ``torchrun -m train CONFIG``, ``accelerate launch -m train CONFIG``."""

from train.cli import main

main()
