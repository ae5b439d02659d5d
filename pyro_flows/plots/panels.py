"""Figures of several panels; matplotlib is imported when the first figure is made."""

import textwrap
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from .picture import Picture as Picture
else:
    Picture: TypeAlias = Any


def panels(width: float, height: float, number: int, columns: int, **settings: Any) -> tuple[Picture, list[Any]]:
    """Return a figure, its size in inches, and the axes of its panels, row by row."""
    from . import picture

    made = picture.Picture(width, height)
    axes = list(made.subplots(-(-number // columns), columns, squeeze=False, **settings).flat)
    for axis in axes[number:]:
        axis.remove()
    for axis in axes[:number]:
        axis.spines[["top", "right"]].set_visible(False)
    return made, axes[:number]


def head(picture: Picture, text: str) -> None:
    """Set a long title."""
    picture.suptitle(textwrap.fill(plain(text), 130), fontsize=10)


def plain(text: str) -> str:
    """Return a text with escaped dollars, since matplotlib would parse what they enclose as a formula."""
    return text.replace("$", r"\$")


def shortened(name: str, most: int = 20) -> str:
    """Return a name of at most ``most`` characters, plain."""
    return plain(name if len(name) <= most else f"{name[: most // 2]}…{name[most // 2 + 1 - most :]}")
