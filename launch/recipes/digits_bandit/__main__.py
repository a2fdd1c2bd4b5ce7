"""Train it: `python -m launch.recipes.digits_bandit`, or the same after `torchrun --nproc_per_node=P`."""

from launch.recipes.digits_bandit.train import train

if __name__ == "__main__":
    train(report=True)
