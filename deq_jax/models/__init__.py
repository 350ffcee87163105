"""Linen modules, and the classifiers that run them."""

from deq_jax.models.base import Classifier, Prediction, Variables
from deq_jax.models.classifiers import Dynamics, Equilibrium, Explicit, require_deq
from deq_jax.models.convolution import conv_general_dilated
from deq_jax.models.layers import BatchNorm, GroupNorm, conv_layer, dropout_mask
from deq_jax.models.mdeq import Mdeq, MdeqCell, MdeqDecoder, MdeqEncoder, mdeq, mdeq_large, mdeq_xl
from deq_jax.models.normalized import Normalized, normalized
from deq_jax.models.penalty import JacobianRegularization
from deq_jax.models.pretrained import Pretrained, pretrained
from deq_jax.models.resnets import ResNet18, WideResNet
from deq_jax.models.small import SmallCell, SmallCNN, SmallDecoder, SmallEncoder, small_cnn, small_deq

__all__ = [
    "BatchNorm",
    "Classifier",
    "Dynamics",
    "Equilibrium",
    "Explicit",
    "GroupNorm",
    "JacobianRegularization",
    "Mdeq",
    "MdeqCell",
    "MdeqDecoder",
    "MdeqEncoder",
    "Normalized",
    "Prediction",
    "Pretrained",
    "ResNet18",
    "SmallCNN",
    "SmallCell",
    "SmallDecoder",
    "SmallEncoder",
    "Variables",
    "WideResNet",
    "conv_general_dilated",
    "conv_layer",
    "dropout_mask",
    "mdeq",
    "mdeq_large",
    "mdeq_xl",
    "normalized",
    "pretrained",
    "require_deq",
    "small_cnn",
    "small_deq",
]
