"""A folder of images of one size, read into memory as uint8.

Images are taken in the order of their paths. Where every image lies in a sub-folder, and there are at
least two, the sub-folders directly below the folder are the classes, in alphabetical order. All images are
read as grey (mode L) if all are grey, else as RGB; transparency is dropped. Hidden files and files that are
not images are ignored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fewstep.data.scaling import Layout
from fewstep.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "ImageFolder", "read_folder"]

IMAGE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
_GREY_MODES = ("1", "L", "LA")


@final
@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder.

    Attributes:
        rows: uint8 ``(N, C, H, W)``.
        layout: ``HW`` for grey images, ``HWC`` for colour images.
        labels: int64 ``(N,)``, the number of the sub-folder of each image; None without sub-folders.
        label_names: the names of the sub-folders; None without sub-folders.
    """

    rows: NDArray[np.uint8]
    layout: Layout
    labels: NDArray[np.int64] | None
    label_names: tuple[str, ...] | None


def _image_paths(folder: Path) -> list[Path]:
    """Return the paths of the images relative to the folder, sorted; refuse fewer than two."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = Path(parent).relative_to(folder)
        found += [
            here / name for name in files if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    if not found:
        raise UserError(
            f"the folder {str(folder)!r} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}). "
            "Give a folder of images, or an array file (.npy, .npz, idx)."
        )
    if len(found) < 2:
        raise UserError(f"the folder {str(folder)!r} holds 1 image, and at least 2 are needed.")
    return sorted(found, key=lambda path: path.parts)


def _read(path: Path, mode: str | None) -> Any:
    """Return an image decoded to uint8 in the given mode; without a mode, its size and mode."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return (image.size, image.mode) if mode is None else np.asarray(image.convert(mode))
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"cannot read the image {str(path)!r}: {error}. Remove it or write it again.") from error


def _common_mode(folder: Path, paths: list[Path]) -> tuple[tuple[int, int], str]:
    """Return the size of all images and the mode that they are converted to."""
    grey = True
    for number, path in enumerate(paths):
        size, mode = _read(folder / path, None)
        if mode == "F" or mode.startswith("I"):
            raise UserError(
                f"the image {str(folder / path)!r} has more than 8 bits a pixel (mode {mode}). "
                "Save all images as a .npy array (N, H, W), or convert them to 8 bits."
            )
        if number == 0:
            first = size
        elif size != first:
            raise UserError(
                f"images of different sizes: {str(folder / paths[0])!r} is {first[0]} x {first[1]} and "
                f"{str(folder / path)!r} is {size[0]} x {size[1]}. Resize or crop them all to one size "
                "first, e.g. with PIL.ImageOps.fit(image, (64, 64))."
            )
        grey = grey and mode in _GREY_MODES
    return first, "L" if grey else "RGB"


def read_folder(folder: Path) -> ImageFolder:
    """Read all images below ``folder``, in the order of their paths.

    Raises:
        UserError: there are fewer than two images, one is unreadable or has more than 8 bits per pixel, or the
            sizes differ; the message names the files.
    """
    paths = _image_paths(folder)
    (width, height), mode = _common_mode(folder, paths)
    rows = np.empty((len(paths), 1 if mode == "L" else 3, height, width), np.uint8)
    for row, path in zip(rows, paths, strict=True):
        pixels = _read(folder / path, mode)
        row[:] = pixels if mode == "L" else np.moveaxis(pixels, -1, 0)
    layout: Layout = "HW" if mode == "L" else "HWC"
    classes = sorted({path.parts[0] for path in paths})
    if any(len(path.parts) == 1 for path in paths) or len(classes) < 2:
        return ImageFolder(rows, layout, None, None)
    labels = np.array([classes.index(path.parts[0]) for path in paths], np.int64)
    return ImageFolder(rows, layout, labels, tuple(classes))
