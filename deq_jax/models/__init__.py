"""Linen modules, and the classifiers that run them."""

from deq_jax.models.base import Classifier, Prediction, Variables
from deq_jax.models.classifiers import Dynamics, Equilibrium, Explicit, require_deq
from deq_jax.models.convolution import conv_general_dilated
from deq_jax.models.layers import BatchNorm, GroupNorm, conv_layer, dropout_mask
from deq_jax.models.mdeq import Mdeq, MdeqCell, MdeqDecoder, MdeqEncoder, mdeq, mdeq_large, mdeq_small, mdeq_xl
from deq_jax.models.normalized import Normalized, normalized
from deq_jax.models.penalty import JacobianRegularization
from deq_jax.models.pretrained import Pretrained, pretrained
from deq_jax.models.resnets import ResNet18, WideResNet
from deq_jax.models.small import SmallCell, SmallCNN, SmallDecoder, SmallEncoder, small_cnn, small_deq
from deq_jax.models.weight_tied import WeightTied, explicit_twin

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
    "WeightTied",
    "WideResNet",
    "conv_general_dilated",
    "conv_layer",
    "dropout_mask",
    "explicit_twin",
    "mdeq",
    "mdeq_large",
    "mdeq_small",
    "mdeq_xl",
    "normalized",
    "pretrained",
    "require_deq",
    "small_cnn",
    "small_deq",
]
