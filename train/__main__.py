"""``python -m logitcask.train``, for launchers that start modules: ``torchrun -m logitcask.train
CONFIG``, ``accelerate launch -m logitcask.train CONFIG``.
"""

from logitcask.train.cli import main

main()
