r"""A small MDEQ on anyone's photographs, as image files in folders, PGD adversarial training at epsilon 8/255.

    python -m deq_jax.train --config configs/photos_small_pgd_at.py --workdir runs/photos_small_pgd_at \
        --set dataset.path=photos --set classifier.decoder.num_classes=4

The images are scaled and cropped to 32x32 pixels. The number of classes is 10, unless it is set.
Hardware: any, a CPU included. Its accuracy has not been measured here.
"""

from configs.cifar import small_recipe
from deq_jax import TrainConfig
from deq_jax.data import ImageFolder


def get_config() -> TrainConfig:
    return small_recipe(ImageFolder("", size=32, colours="rgb"), num_classes=10)
