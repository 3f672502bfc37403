"""What of the package's extras is missing, said where it is needed."""

from importlib.util import find_spec

from foreseer.errors import ForeseerError

OF_EXTRAS = {
    "train": {
        "datasets": "datasets",
        "kan": "pykan",
        "lightning": "lightning",
        "matplotlib": "matplotlib",
        "pandas": "pandas",
        "sklearn": "scikit-learn",
        "tensorboard": "tensorboard",
        "torchmetrics": "torchmetrics",
    },
    "perceptual": {"stlpips_pytorch": "stlpips-pytorch"},
    "web": {"gradio": "gradio"},
}
"""For each extra: the packages in pyproject.toml, by the name they are imported by."""


class MissingExtra(ForeseerError, ModuleNotFoundError):
    """Something was asked for that needs packages which are not installed."""


def require(extra: str, purpose: str) -> None:
    """Go on only where all packages of an extra are installed; none of them is imported.

    Args:
        extra: a key of `OF_EXTRAS`.
        purpose: what needs them, the beginning of the sentence.

    Raises:
        MissingExtra: some are not.
    """
    packages = OF_EXTRAS[extra]
    missing = [package for name, package in packages.items() if find_spec(name) is None]
    if missing:
        some = "are" if len(missing) > 1 else "is"
        raise MissingExtra(
            f"{purpose} needs the extra `{extra}`, of which {', '.join(missing)} {some} not "
            f'installed; expected all of it: pip install "foreseer[{extra}]"'
        )
