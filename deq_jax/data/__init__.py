"""Datasets, and the batches made of them."""

from deq_jax.data.batches import CropFlip, EvaluationBatch, batch_indices, evaluation_batches, to_unit
from deq_jax.data.cifar import Cifar
from deq_jax.data.datasets import Dataset, Digits, Images, Npz, Splits, Tfds, class_names, hold_out
from deq_jax.data.folders import ImageFolder

__all__ = [
    "Cifar",
    "CropFlip",
    "Dataset",
    "Digits",
    "EvaluationBatch",
    "ImageFolder",
    "Images",
    "Npz",
    "Splits",
    "Tfds",
    "batch_indices",
    "class_names",
    "evaluation_batches",
    "hold_out",
    "to_unit",
]
