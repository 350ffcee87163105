"""Plain signs that a classifier has not learned, or that its solver does not converge."""

from __future__ import annotations

from scipy import special

SIGNIFICANT = 0.05  # level of all tests against chance

CONVERGED = 0.05  # mean relative residual up to which a solver counts as converged


def plain_warnings(accuracy: float, images: int, classes: int, residual: float | None = None) -> list[str]:
    """Warnings to read before any other number of a classifier.

    Args:
      accuracy: accuracy of the deployed predictor on clean images, from 0 to 1.
      images: their number.
      classes: number of classes; guessing is right for one image in so many.
      residual: mean of the images' relative residuals at the equilibrium; None without a solver.

    Returns:
      A sentence with advice for each sign: the accuracy is at chance (an exact binomial test does not tell it from
      guessing, at 5 %), or the mean residual is above 0.05. Usually none.

    Examples:
      >>> from deq_jax.evaluation import plain_warnings
      >>> [text.partition(";")[0] for text in plain_warnings(accuracy=0.1, images=100, classes=10)]
      ['clean accuracy is at chance: 10.0 % of 100 images, guessing gives 10.0 %']
    """
    found = []
    correct = round(accuracy * images)
    if images > 0 and classes > 1 and special.bdtrc(correct - 1, images, 1 / classes) > SIGNIFICANT:
        told = f"{100 * accuracy:.1f} % of {images} images, guessing gives {100 / classes:.1f} %"
        advice = "train longer, or with a smaller learning rate, a weaker attack or more pretrain_steps"
        found.append(f"clean accuracy is at chance: {told}; {advice}")
    if residual is not None and residual > CONVERGED:
        advice = "give it more steps, or train with a smaller learning rate or a Jacobian penalty"
        found.append(
            f"the solver has not converged: mean residual {residual:.2g}, expected at most {CONVERGED}; {advice}"
        )
    return found
